"""Training under Lightning, with the book's towers and loss inside.

Read `step.py` (what one step does), `optimizer.py` and `muon.py` (how it moves the weights), then what stands around
it: `measuring.py`, `finite.py`, `checkpoints.py`, `resume.py`, `stopping.py`, `progress.py`. How a step is computed,
with the same result, is changed by `recompute.py` and `fsdp.py`. The command line is in `commands/train.py`, not here.
"""
