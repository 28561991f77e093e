"""Writes the published data sets in their official layouts, in miniature, with the masks that a loader must find in them.

Every quirk of the real files has its place: crowd regions, empty and several segments, texts in Windows-1252, palette and 16-bit
label maps, masks of one pixel, pickles of Python 2's protocols.
"""

from __future__ import annotations

import pickle
from typing import Any


def pickled(value: Any, protocol: int = 2) -> bytes:
    """As the makers of the referring data sets wrote them; protocol 2 was Python 2's best."""
    return pickle.dumps(value, protocol)
