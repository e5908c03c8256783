"""What a picture's score hangs on: maps of its pixels, weights of a text's words, and how far to believe either.

Read `explain.py` first; it calls the rest. `attention.py`, `pixels.py` and `words.py` make relevances, `deletion.py`
scores them beside random ones, `placing.py` finds where in the picture the model looks. Nothing here draws or prints.
"""
