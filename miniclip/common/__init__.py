"""What every wing needs and nothing of CLIP: files, URLs, processes, devices, words.

Read `files.py` first (files appear whole or not at all; errors that a person can read). Nothing here imports anything
else of the package, and nothing that only one wing needs comes in.
"""
