"""``python -m utils.sam_cache``: the code is in utils/precompute/sam_cache.py."""

import sys

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores.utils.precompute.sam_cache import main

if __name__ == "__main__":
    sys.exit(main())
