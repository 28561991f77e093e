"""The command ``python -m dataset.synthetic``; its code is dataset/synthetic/write.py."""

import sys

from dataset.synthetic.write import main

if __name__ == "__main__":
    sys.exit(main())
