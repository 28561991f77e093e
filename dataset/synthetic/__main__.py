"""The command ``python -m dataset.synthetic``; its code is dataset/synthetic/write.py."""

import sys

from dataset import command

if __name__ == "__main__":
    command.guard()

from dataset.synthetic.write import main

if __name__ == "__main__":
    sys.exit(main())
