"""Results and runs as files, tables, pictures and pages that open without a network.

Read `results.py` (what is written), `tables.py` and `page.py` for evaluation; `runs.py` and `run_page.py` for
training. Nothing here computes a score.
"""
