"""Which samples make a batch, and in what order they come.

Read `order.py` (the exact order, in which each epoch is every sample once), `negatives.py` (the same with alike samples
in one batch; by what: `likeness.py`; what can't hold: `contradictions.py`) and `ahead.py` (remote shards are fetched
before they are needed), then `stream.py` (tars in the order in which readers take them) and `tar_reader.py` (what a
reader does with them). No model.
"""
