"""``python -m utils.predict``: the code is in utils/predicting.py."""

from cores.dataset import command
from cores.utils.settings.programs import read_predict

if __name__ == "__main__":
    command.guard(read_predict)

from cores.utils.predicting import main

if __name__ == "__main__":
    command.leave(main())
