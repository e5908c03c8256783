"""Zero-shot scores: `python eval_zeroshot.py --model M --data D …`. The work is in miniclip/suite.py."""

import sys

from miniclip.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
