"""``python -m utils.evaluation``: the commands of utils/evaluation/cli.py."""

from dataset import command

if __name__ == "__main__":
    command.guard()

from utils import distributed
from utils.evaluation.cli import main

if __name__ == "__main__":
    distributed.leave(main())
