"""--exclude_val: photos that are validated on are left out of training, whatever data set they come
with.

COCO's photos are used again and again: those of refCOCO's val and test splits are training images
of COCO, COCO-Stuff, PACO, LLaVA-Instruct and LLM-Seg40K. All of these name a photo by COCO's
number.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from dataset.files.errors import DataError
from dataset.sample import LoaderOptions

logger = logging.getLogger(__name__)

# 000000581857.jpg · COCO_train2014_000000581857.jpg · train2017/000000581857.jpg
_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})")


def coco_number(file_name: str) -> int | None:
    """COCO's number of a photo, the same in its releases of 2014 and 2017; None for a name that is
    not COCO's."""
    found = _COCO_NAME.fullmatch(PurePosixPath(file_name).stem)
    return int(found[1]) if found else None


def without_excluded(
    records: Sequence, names: Sequence[str], options: LoaderOptions, dataset: str
) -> Sequence:
    """The ``records`` whose image (``names``, in the same order) may be trained on; logs how many
    were left out.

    Raises DataError if none is left.
    """
    if not options.excluded_coco:
        return records
    kept = [
        record
        for record, name in zip(records, names, strict=True)
        if coco_number(name) not in options.excluded_coco
    ]
    logger.info(
        "--exclude_val: %s: %d of %d entries are left out",
        dataset,
        len(records) - len(kept),
        len(records),
    )
    if not kept:
        raise DataError(
            f"{dataset}: --exclude_val leaves none of its {len(records)} entries; leave the data"
            " set or the flag out"
        )
    return kept
