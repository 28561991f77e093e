"""The pickles of the referring data sets, read without running anything that they ask for.

A pickle is a program: it may name any function of any module and call it. The files of refCOCO and
its kin, written by Python 2 at protocol 0 or 2, need lists, dicts, texts and numbers only, and
these have instructions of their own. So nothing that is looked up by name is allowed, apart from a
few builtin types that a re-saved file may name.
"""

from __future__ import annotations

import builtins
import pickle
from pathlib import Path
from typing import Any

from cores.dataset.files.errors import DataError, MissingDataError, reason_of

# Calling one of these types only copies its argument. bytearray and range are not among them: they
# would allocate memory of any size for a number in the file.
HARMLESS = ("bool", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")
PYTHON_2 = {"unicode": "str", "long": "int"}
# A damaged file leads the unpickler to wrong operands, missing arguments and absurd lengths.
DAMAGE = (EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError, OverflowError)


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__"):
            name = PYTHON_2.get(name, name) if module == "__builtin__" else name
            if name in HARMLESS:
                return getattr(builtins, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: str | Path) -> Any:
    """The lists, dicts, texts and numbers of a pickle file; texts of Python 2 are taken as UTF-8.

    Raises MissingDataError, or DataError naming the file and whatever else it asks for.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            return _RestrictedUnpickler(stream, encoding="utf-8", errors="replace").load()
    except FileNotFoundError:
        raise MissingDataError(
            f"{path}: does not exist; check --dataset_dir and the names of the data sets"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({reason_of(error)}); a pickle file is expected"
        ) from None
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: refused, no plain list of references ({reason_of(error)}); download the"
            " original file"
        ) from None
    except DAMAGE as error:
        raise DataError(
            f"{path}: damaged pickle ({reason_of(error)}); download the original file"
        ) from None
