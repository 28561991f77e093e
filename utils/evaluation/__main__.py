"""``python -m utils.evaluation``: the commands of utils/evaluation/cli.py."""

from cores.dataset import command
from cores.utils.settings.programs import read_any_evaluation

if __name__ == "__main__":
    command.guard(read_any_evaluation)

from cores.utils.evaluation.cli import main

if __name__ == "__main__":
    command.leave(main())
