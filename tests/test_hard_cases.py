"""What real folders and hostile files hold besides: numbers that no polygon has, odd names, linked folders, turned photos."""

import tempfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dataset.coco import annotation_mask
from dataset.images import DataError, MissingDataError
from dataset.mixture import TrainMixture
from dataset.own import OwnData
from dataset.registry import open_evaluation
from dataset.sample import LoaderOptions
from dataset.store import cache_root
from tests import official_layouts as official
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


@pytest.mark.parametrize("rates", [[float("inf"), 1], [1e308, 1e308], [float("nan"), 1]], ids=str)
def test_rates_are_finite(tmp_path, rates):
    """Before any file is looked for."""
    with pytest.raises(ValueError, match="--sample_rates .* give 2 numbers .*finite"):
        TrainMixture(tmp_path, "sem_seg||vqa", rates, LEVELS, 4)


# ----------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["a" * 300 + ".jpg", "\ud800.jpg", "loop/x.jpg"], ids=["long", "half", "loop"])
def test_what_no_file_can_be_called(tmp_path, name):
    write_table(tmp_path, [{"image": name, "query": "q", "polygons": [FLAT]}])
    (tmp_path / "own/table/loop").symlink_to(tmp_path / "own/table/loop")
    with pytest.raises(DataError, match="train.jsonl:1: .* cannot be opened"):
        OwnData(tmp_path, "table", EVAL)


def test_a_link_to_itself_among_the_images(tmp_path):
    folder = write_reason_seg(tmp_path, count=1)
    (folder / "x.jpg").symlink_to(folder / "x.jpg")
    with pytest.raises(DataError, match="'x.jpg' cannot be opened"):
        open_evaluation(tmp_path, "ReasonSeg|train", EVAL)


LINKED = {
    "coco|train2017": "coco/train2017",
    "paco_lvis|train": "coco/train2017",
    "cocostuff|train2017": "coco/train2017",
    "vqa|llava_instruct_150k": "llava_dataset/llava_instruct_150k.json",
    "LLM-Seg40K|val": "reason_seg/LLM-Seg40K",
    "ReasonSeg|val": "reason_seg/ReasonSeg",
    "refcoco|unc|val": "refer_seg/images/mscoco/images/train2014",
    "ade20k|training": "ade20k/images",
    "pascal_part|train": "vlpart/pascal_part",
    "own:table|train": "own/table",
}


@pytest.mark.parametrize(("spec", "place"), LINKED.items(), ids=LINKED.keys())
def test_a_folder_that_the_user_links_is_used(tmp_path, spec, place):
    """Photos of COCO lie on another disk, or serve several projects."""
    official.write_everything(tmp_path / "data")
    write_table(tmp_path / "data")
    link = tmp_path / "data" / place
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    assert open_all(open_evaluation(tmp_path / "data", spec, EVAL))


def test_a_file_where_a_folder_is_expected(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/annotations").write_text("")
    with pytest.raises(MissingDataError, match="instances_train2017.json: does not exist"):
        open_evaluation(tmp_path, "coco|train2017", EVAL)


def test_a_user_without_a_home(tmp_path, monkeypatch):
    for name in ("CORES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_root().is_relative_to(tmp_path)
