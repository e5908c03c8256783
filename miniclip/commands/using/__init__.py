"""Verbs that look into a trained model or put it to use elsewhere; like those in the folder above, one file each.

Read `main.py` there for the list.
"""
