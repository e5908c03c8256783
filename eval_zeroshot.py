"""Zero-shot scores: `python eval_zeroshot.py --model M --data D …`. The work is in miniclip/evaluate.py."""

import sys

from miniclip.cli import evaluate

if __name__ == "__main__":
    evaluate(sys.argv[1:])
