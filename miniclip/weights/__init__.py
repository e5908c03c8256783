"""Checkpoints of every layout in and out. Nothing here runs code from a file.

Read `load.py` (a model from anything, and back), `read.py` (a path -> tensors and architecture), `layouts.py` (one
table of names per layout), `architecture.py` (widths and depths from shapes or configurations), `torchscript.py`
(OpenAI's archives as data); then `convert.py`, `write.py`, `facts.py` and `download.py`. No data, no training.
"""
