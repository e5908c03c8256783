"""Zero-shot scores: `python eval_zeroshot.py --model M --data D …`. The work is in miniclip/evaluation/suite.py."""

import sys

try:
    from miniclip.commands.main import main
except KeyboardInterrupt:
    raise SystemExit(130) from None

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]], ends_process=True)
