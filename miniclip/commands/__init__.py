"""The shell's verbs, one file each: options in, library calls, words out.

Read `main.py` for the list. A verb imports what it needs when it runs, so that `--help` needs no torch. No result is
computed here.
"""
