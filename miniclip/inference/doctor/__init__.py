"""What is wrong with one's pairs, beyond files that can't be read: found, counted, and listed by the pair.

Read `examine.py` first, the whole of it from outside. `pictures.py` looks at each picture once and `parts.py` at a
source of them; `near.py` finds near duplicates and what they leak, `captions.py` and `languages.py` what captions have
wrong by themselves, `fits.py` (with a model) captions that do not fit. `costs.py` says what that does to the loss,
`findings.py` what a finding is, and `lists.py` writes the tables. Nothing here prints.
"""
