"""Trains a CLIP: `python train.py fit --config configs/digits.yaml`. The work is in miniclip/commands/train.py."""

import sys

try:
    from miniclip.commands.main import main
except KeyboardInterrupt:
    raise SystemExit(130) from None

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], ends_process=True)
