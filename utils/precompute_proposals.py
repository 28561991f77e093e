"""``python -m utils.precompute_proposals``: the code is in utils/precompute/proposals.py."""

import sys

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores.utils.precompute.proposals import main

if __name__ == "__main__":
    sys.exit(main())
