"""``python -m utils.sam_cache``: the code is in utils/precompute/sam_cache.py."""

import sys

from dataset import command

if __name__ == "__main__":
    command.guard()

from utils.precompute.sam_cache import main

if __name__ == "__main__":
    sys.exit(main())
