"""``python -m utils.precompute_proposals``: the code is in utils/precompute/proposals.py."""

import sys

from cores.dataset import command
from cores.utils.settings.programs import read_proposals

if __name__ == "__main__":
    command.guard(read_proposals)

from cores.utils.precompute.proposals import main

if __name__ == "__main__":
    sys.exit(main())
