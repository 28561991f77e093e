"""The command ``python -m utils.curve``; its code is utils/training/curve.py."""

import sys

from utils.training.curve import main

if __name__ == "__main__":
    sys.exit(main())
