"""Verbs that put a trained model to use elsewhere; like those in the folder above, one file each.

Read `main.py` there for the list.
"""
