"""``python -m utils.sam_cache``: the code is in utils/precompute/sam_cache.py."""

import sys

from cores.dataset import command
from cores.utils.settings.programs import read_sam_cache

if __name__ == "__main__":
    command.guard(read_sam_cache)

from cores.utils.precompute.sam_cache import main

if __name__ == "__main__":
    sys.exit(main())
