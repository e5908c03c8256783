"""What people do with a trained model: classify, embed and search, from the shell or from Python.

Nothing here prints or reads a command line: `commands/` has a file for each verb, and turns what these functions return
into tables, files and messages. `thresholds.py` has what travels with a model: when an image is none of the classes.
"""
