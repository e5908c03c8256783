"""How each kind of source is read: folders, tables and their cells, Hugging Face's data sets.

`pair.py` says what a pair is, `scan.py` sorts the files of a folder; then `folders.py` with `imagefolder.py`,
`tables.py`, `json_tables.py`, `parquet.py`, `rows.py` with `cells.py` and `paths.py`, and `huggingface.py`.
`sources.py`, one folder up, chooses among them. `listed.py` matches a table that names pairs with the pairs of a
source. No picture is decoded here, and every file or row is taken, rejected, or counted by the reason why it is not.
"""
