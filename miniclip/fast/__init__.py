"""The same numbers for less work.

Each file is one fast path and is tested equal to its long form in `model.py`, `resnet.py`, `loss.py` or `images.py`;
the book is complete without this folder. `bfloat16.py` is the exception: nearly the same numbers for half of the time,
where a user asks for them. Read `plain.py` first: it says when a fast path may act at all. Nothing here imports the
book, Lightning, or a file format.
"""
