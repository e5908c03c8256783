"""Embeddings of as many images or texts as a disk holds, in files; or of a few, in an array.

Read `embed.py` first. `parts.py` has the files, and what happens when a process is killed; `source_rows.py` what each
row has beside its embedding; `on_ray.py` the pass by a cluster's actors. Nothing here prints.
"""
