"""``python -m utils.evaluation``: the commands of utils/evaluation/cli.py."""

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores.utils import distributed
from cores.utils.evaluation.cli import main

if __name__ == "__main__":
    distributed.leave(main())
