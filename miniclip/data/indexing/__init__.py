"""Tars that somebody else wrote -> an index, which is all that they lack to be shards.

Read `index_tars.py`, then `one_tar.py` (as a whole, or by its headers), `tar_members.py` (which members make a sample)
and `journal.py` (what is indexed so far).
"""
