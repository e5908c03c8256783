"""The two verbs of an index of pictures: `index.py` makes it and brings it up to date, `search.py` asks it."""
