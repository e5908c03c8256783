"""Trains a CLIP: `python train.py fit --config configs/digits.yaml`. The work is in miniclip/training.py."""

from miniclip.training import main

if __name__ == "__main__":
    main()
