"""How good a model is: labelled or captioned images -> features -> scores with their intervals.

Read `prompts.py`, `encoder.py` (what a model is here), `scores.py` (what every kind of scores answers), its kinds
`zero_shot.py`, `multilabel.py` and `retrieval.py`, and `suite.py`; then `splits.py` and `probes.py`. `datasets/` opens
what can be scored on, `measures/` turns scores into numbers. Nothing here prints, draws or trains.
"""
