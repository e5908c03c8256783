"""Scores in, numbers with their meaning out. Pure functions of arrays: no model, no file, no name of a class.

Read `classification.py`, `ranking.py`, `thresholds.py`; `statistics.py` has their intervals and tests.
"""
