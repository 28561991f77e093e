"""``python -m utils.precompute_proposals``: the code is in utils/precompute/proposals.py."""

import sys

from dataset import command

if __name__ == "__main__":
    command.guard()

from utils.precompute.proposals import main

if __name__ == "__main__":
    sys.exit(main())
