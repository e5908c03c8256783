"""What can be evaluated on: images with a label, with several labels, or with captions.

Read `sets.py` (what a set is), `open.py` (which reader a source gets), then the readers. No model comes in here.
"""
