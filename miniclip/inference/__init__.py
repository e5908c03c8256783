"""What people do with a trained model: classify, embed and search, from the shell or from Python.

Read `sources.py` first (what is named -> images or texts; `names.py` reads the names), then a file for each thing to
do; `embedding/` writes files of embeddings; `search/` is an index of pictures; `explanation/` shows what a score hangs
on; `thresholds.py` has what travels with a model: when an image is none of the classes; `text_states.py` is for models
that condition on texts. Nothing here prints or reads a command line: `commands/` has a file for each verb, and turns
what these functions return into tables, files and messages.
"""
