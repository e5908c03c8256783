"""Training under Lightning, with the book's towers and loss inside.

1. `step.py`: one step of training, and the validation between steps. `start.py`: the weights that a run starts from,
   and what the trainer, its data and the model have to agree on.
2. `optimizer.py`, `muon.py`: how the weights move.
3. `distillation.py`, `recompute.py`, `fsdp.py`: a teacher, less memory, weights sliced over processes.
4. Callbacks around the step: `measuring.py` (what is logged), `finite.py` and `resume.py` (what is
   refused), `checkpoints.py` and `stopping.py` (what is kept), `zero_shot.py` and `progress.py` (what is shown;
   the former also keeps the wordings of the captions).
5. `run_folder.py`: one run at a time in a folder, and its metrics.csv.

`lightning_private.py` names Lightning's private members. The command line is `commands/train.py`; it never enters here.
"""
