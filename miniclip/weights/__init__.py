"""Checkpoints of every layout in and out. Nothing here runs code from a file.

Read `load.py` (a model from anything, and back), `read.py` (whatever holds tensors), `layouts.py` (one table of names
per layout), `torchscript.py` (OpenAI's archives as data), then `convert.py` and `download.py`. No data, no training.
"""
