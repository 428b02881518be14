"""``python -m eval.report RUN [RUN...]``."""

import sys

from eval.report.page import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
