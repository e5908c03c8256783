"""What people do with a trained model, from the shell or from Python.

Read `sources.py` first (what is named -> images or texts; `names.py` reads the names), then a file or folder for each
thing to do: `classify.py` and `sorting.py`, `embedding/` (files of embeddings), `search/` (an index of pictures),
`explanation/` (what a score hangs on), `exporting/` (a model for other runtimes), `push.py` and `card.py` (a model for
other people), `app/` (a page), `doctor/` (what is wrong with pairs). `thresholds.py` has what travels with a model:
when an image is none of the classes. `classifier.py` has scikit-learn's interface; `text_states.py` is for models that
condition on texts.

Nothing here prints or reads a command line: `commands/inference/` has a file for each verb, and turns what these
functions return into tables, files and messages.
"""
