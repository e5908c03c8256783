"""What people do with a trained model: classify, embed and search, from the shell or from Python.

Nothing here prints or reads a command line: `commands/` has a file for each verb, and turns what these functions return
into tables, files and messages.
"""
