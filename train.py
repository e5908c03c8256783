"""Trains a CLIP: `python train.py fit --config configs/digits.yaml`. The work is in miniclip/trainer.py."""

import sys

from miniclip.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
