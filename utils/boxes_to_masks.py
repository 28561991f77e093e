"""``python -m utils.boxes_to_masks``: the code is in utils/precompute/boxes_to_masks.py."""

import sys

from cores.dataset import command
from cores.utils.settings.programs import read_boxes

if __name__ == "__main__":
    command.guard(read_boxes)

from cores.utils.precompute.boxes_to_masks import main

if __name__ == "__main__":
    sys.exit(main())
