"""``python -m utils.evaluation``: the commands of utils/evaluation/cli.py."""

import sys

from utils import distributed
from utils.evaluation.cli import main

if __name__ == "__main__":
    code = main()
    if code == 0:
        distributed.stop()
    sys.exit(code)
