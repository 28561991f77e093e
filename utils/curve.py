"""``python -m utils.curve``: the code is in utils/training/curve.py."""

import sys

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores.utils.training.curve import main

if __name__ == "__main__":
    sys.exit(main())
