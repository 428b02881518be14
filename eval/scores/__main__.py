"""``python -m eval.scores FILE [FILE...]``: this program stands above the wings whose modules it
joins."""

import sys

from eval.report.judgment_table import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
