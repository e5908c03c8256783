"""A model as files that run without miniclip and without PyTorch, proven before they get their name.

`export.py` is what `miniclip export` does, from the checkpoint to the folder. `towers.py` is what exporters take, and
`onnx_files.py`, `torch_program.py`, `openvino_files.py`, `web.py` write a target each. `cleaning.py` and
`tokenizer_file.py` are the tokenizer as data, `facts.py` is everything else that a runner has to know. `runner.py`
travels with every export; `proof.py` runs it beside the model that was exported.
"""
