"""Trains a CLIP: `python train.py fit --config configs/digits.yaml`. The work is in miniclip/trainer.py."""

from miniclip.trainer import main

if __name__ == "__main__":
    main()
