"""The verbs that use a trained model, a file each: options in, calls of the package's `inference/`, words out.

Read `classify.py` first. No result is computed here.
"""
