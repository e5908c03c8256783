"""A local page for a model: guesses, prompts beside each other, heat maps, search, the run's report.

Read `answers.py` (what a request is answered with, as HTML), `limits.py` (which requests are not answered), `page.py`
(the page that asks, built with Gradio). Nothing here writes a file or asks another host.
"""
