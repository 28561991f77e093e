"""What real folders and hostile files hold besides: numbers that no polygon has, odd names, linked folders, turned photos."""

import json
from pathlib import Path

import numpy as np
import pytest

from dataset.coco import annotation_mask
from dataset.images import DataError
from dataset.own import OwnData
from dataset.registry import open_evaluation
from dataset.sample import LoaderOptions
from tests.dataset_toys import LEVELS, square, write_json, write_reason_seg
from tests.own_toys import write_table

EVAL = LoaderOptions(LEVELS, training=False)
FLAT = [2, 2, 6, 2, 6, 5, 2, 5]


def open_all(loader) -> int:
    for index in range(len(loader)):
        loader.sample(index, np.random.default_rng(0))
    return len(loader)


# --------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e9, 1e308, 10**400, None, "4", [4, 5]], ids=str)
def test_no_coordinate_kills_the_process(bad):
    """pycocotools ends with a segmentation fault for most of these."""
    with pytest.raises(DataError, match="^file: field must be polygons"):
        annotation_mask([[bad, *FLAT[1:]]], (20, 30), Path("file"), "field")


def test_a_number_of_400_digits_is_no_coordinate(tmp_path):
    write_table(tmp_path, [{"image": "0.jpg", "query": "q", "polygons": [[10**400, *FLAT[1:]]]}])
    with pytest.raises(DataError, match="no coordinate"):
        OwnData(tmp_path, "table", EVAL)
    shape = square(1, 1, 4, 4)
    shape["points"][0][0] = 10**400
    write_json(write_reason_seg(tmp_path, count=1) / "000.json", {"text": "q", "shapes": [shape]})
    with pytest.raises(DataError, match=r'"shapes"\[0\] needs "points"'):
        open_evaluation(tmp_path, "ReasonSeg|train", EVAL)
