"""Which samples make a batch, and in what order they come.

Read `order.py` (the exact order, in which each epoch is every sample once). No pixels and no model.
"""
