"""The command ``python -m dataset.synthetic``; its code is dataset/synthetic/write.py."""

import sys

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores.dataset.synthetic.write import main

if __name__ == "__main__":
    sys.exit(main())
