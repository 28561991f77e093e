"""``python -m utils.serve``: the code is in utils/serving/api.py."""

from cores.dataset import command
from cores.utils.settings.programs import read_serve

if __name__ == "__main__":
    command.guard(read_serve)

from cores.utils.serving.api import main

if __name__ == "__main__":
    command.leave(main())
