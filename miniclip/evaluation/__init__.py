"""How good a model is: labelled or captioned images -> features -> scores with their intervals.

Read `prompts.py`, `encoder.py` (what a model is here), `zero_shot.py`, `retrieval.py` and `suite.py`; then `splits.py`
and `probes.py`. `datasets/` opens what can be scored on, `measures/` turns scores into numbers. Nothing here prints,
draws or trains.
"""
