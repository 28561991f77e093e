"""``python -m utils.curve``: the code is in utils/training/curve.py."""

import sys

from cores.dataset import command
from cores.utils.settings.programs import read_curve

if __name__ == "__main__":
    command.guard(read_curve)

from cores.utils.training.curve import main

if __name__ == "__main__":
    sys.exit(main())
