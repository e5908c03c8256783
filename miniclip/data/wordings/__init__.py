"""What the captions of a training have in common, so that prompts can be worded like them; and which are equal.

`units.py` splits captions, `mine.py` finds their wordings, `kept.py` is what a model keeps of them, to make prompts of.
`equal_captions.py` says when two are one.
No image, no label, and no class name is needed to find them.
"""
