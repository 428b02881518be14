"""``python -m eval config.json``: the stage mtbench: answers, judgments, scores, report."""

import sys

from eval.evaluation import heed_signals, main

if __name__ == "__main__":
    heed_signals()
    sys.exit(main(sys.argv[1:]))
