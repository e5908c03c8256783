"""Tars that somebody else wrote -> an index, which is all that they lack to be shards.

Read `index_tars.py`, then `tar_members.py` (which members make a sample).
"""
