"""An index of pictures that follows what lies in its sources, and answers by words and by pictures.

Read `index.py` first, the whole of it from outside. `changes.py` finds what is new, changed, moved or gone, with
`columns.py` for what else is known of a picture; `updating.py` encodes and commits that; `store.py` is the table in
LanceDB, `filters.py` its conditions; `nearest.py` computes exact answers. Nothing here prints.
"""
