"""Checkpoints of every layout in and out. Nothing here runs code from a file.

Read `load.py` (a model from anything, and back), `read.py` (a path -> tensors and architecture), `layouts.py` (one
table of names per layout), `architecture.py` (an architecture from shapes or from a library's configuration) with
`heads.py` and `hf_pixels.py`; `containers.py` (files of tensors), `pickles.py` and `unwrap.py` (what torch.save and
trainers put around them), `shapes.py` (which tensors an architecture has, and whether a model computes what its
configuration says); then `convert.py`, `write.py`, `facts.py` and `download.py`. No data, no training.
"""
