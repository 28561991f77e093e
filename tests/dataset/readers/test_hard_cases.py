"""What real folders and hostile files hold besides: numbers that no polygon has, odd names, linked
folders, turned photos."""

import json
import re
import tempfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from cores.dataset import check
from cores.dataset.annotations.masks import annotation_mask
from cores.dataset.files.errors import DataError, MissingDataError, NothingToAsk
from cores.dataset.files.faults import read_skip_list
from cores.dataset.files.images import read_image, read_label
from cores.dataset.files.store import cache_root
from cores.dataset.mixture import TrainMixture
from cores.dataset.readers.own.dataset import OwnData
from cores.dataset.registry import open_evaluation, reasoning_loader, semantic_loader
from cores.dataset.sample import LoaderOptions
from tests import official_layouts as official
from tests.dataset_toys import LEVELS, square, write_image, write_json, write_reason_seg
from tests.own_toys import SIZE, write_coco, write_table

EVAL = LoaderOptions(LEVELS, training=False)
FLAT = [2, 2, 6, 2, 6, 5, 2, 5]


def open_all(loader) -> int:
    for index in range(len(loader)):
        loader.sample(index, np.random.default_rng(0))
    return len(loader)


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -1e9, 1e308, 10**400, None, "four", [4, 5]], ids=str
)
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


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["a" * 300 + ".jpg", "\ud800.jpg", "loop/x.jpg"], ids=["long", "half", "loop"]
)
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
    monkeypatch.setattr(
        Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory."))
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_root().is_relative_to(tmp_path)


def test_a_folder_of_ones_own_that_cannot_be_used_hides_no_other_set(tmp_path, capsys):
    write_table(tmp_path)
    write_table(tmp_path, name="twice").with_suffix(".csv").write_text("image,query\n")
    for name in ("empty", ".ipynb_checkpoints"):
        (tmp_path / "own" / name).mkdir()
    assert check.main(["--dataset_dir", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"own:table\|train +\d images", shown)
    assert re.search(r"own:twice\|all +cannot be opened: .*has train.jsonl and train.csv", shown)
    assert re.search(r"own:empty +own/empty/", shown) and "ipynb" not in shown


def test_a_report_is_printed_whatever_the_names(tmp_path, capsys):
    rows = [
        {"image": name, "query": "q", "polygons": [FLAT]}
        for name in ("\ud800.jpg", "a\u2028b.jpg", "a\nb.jpg")
    ]
    write_table(tmp_path, rows)
    write_image(tmp_path / "own/table/images/a\nb.jpg", SIZE).write_bytes(b"")
    listed = tmp_path / "bad.jsonl"
    assert check.main(["--dataset_dir", str(tmp_path), "--fix-list", str(listed)]) == 1
    capsys.readouterr().out.encode()
    assert [bad.item for bad in read_skip_list(listed)] == [
        "own/table/train.jsonl:1", "own/table/train.jsonl:2", "own/table/images/a\nb.jpg",
    ]  # fmt: skip


def test_a_skip_list_may_be_written_by_others(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"dataset": "x", "item": "a\u2028b"}\r\n', encoding="utf-8", newline="")
    assert [bad.item for bad in read_skip_list(path)] == ["a\u2028b"]


# ------------------------------------------------------------------------------------------- tables


def test_a_line_of_a_table_ends_at_its_end(tmp_path):
    """U+2028 and U+0085 may stand in JSON as they are, and str.splitlines ends a line there."""
    row = json.dumps(
        {"image": "0.jpg", "query": "one\u2028two\x85three", "polygons": FLAT}, ensure_ascii=False
    )
    write_table(tmp_path).write_bytes(f"{row}\r\n".encode())
    loader = OwnData(tmp_path, "table", EVAL)
    assert (
        "one two three" in loader.sample(0, np.random.default_rng(0)).conversations[0].turns[0][0]
    )


def test_a_cell_of_a_csv_may_be_long(tmp_path):
    path = write_table(tmp_path)
    path.unlink()
    outline = FLAT + [2 + i % 7 for i in range(80_000)]
    path.with_suffix(".csv").write_text(f'image,query,polygons\n0.jpg,q,"{outline}"\n')
    assert open_all(OwnData(tmp_path, "table", EVAL)) == 1


def test_boxes_are_no_empty_targets(tmp_path):
    """As exports of data made for detectors have them."""
    box = {
        "id": 1,
        "image_id": 1,
        "category_id": 0,
        "segmentation": [],
        "bbox": [1, 1, 4, 4],
        "area": 16,
        "iscrowd": 0,
    }
    write_coco(tmp_path, annotations=[box])
    with pytest.raises(DataError, match="annotation 1: has no mask, .*boxes_to_masks"):
        OwnData(tmp_path, "coco", EVAL)
    write_coco(tmp_path, annotations=[box | {"bbox": [0, 0, 0, 0]}])
    assert (
        not OwnData(tmp_path, "coco", EVAL)
        .sample(0, np.random.default_rng(0))
        .conversations[0]
        .masks.any()
    )


# ------------------------------------------------------------------------------------------- photos


def turn_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(path).copy()
    picture.save(path, exif=exif)


@pytest.mark.parametrize(
    "spec",
    [
        "ade20k|training",
        "coco|train2017",
        "paco_lvis|train",
        "refcoco|unc|train",
        "LLM-Seg40K|train",
    ],
)
def test_photos_that_were_annotated_lying_are_shown_so(tmp_path, spec):
    """A camera's note in EXIF, which the annotators' tool did not know."""
    layout = official.write_everything(tmp_path)[spec]
    loader = open_evaluation(tmp_path, spec, EVAL)
    turn_by_exif(loader.path(0))
    sample = loader.sample(0, np.random.default_rng(0))
    masks = [expected.mask for expected in layout[sample.id]]
    assert sample.image.shape[:2] == masks[0].shape and len(masks) == len(sample.conversations)
    assert np.array_equal(read_image(loader.path(0)), np.rot90(sample.image, -1)), (
        "elsewhere it is turned"
    )


def test_a_sentence_about_a_polygon_without_area_is_not_asked(tmp_path):
    """One about a segmentation that is empty on purpose is."""
    layout = official.write_everything(tmp_path)["refcoco|unc|train"]
    path = tmp_path / "refer_seg/refcoco/instances.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        if entry["id"] in (10 * official.TRAIN, 10 * official.TRAIN + 1):
            entry["segmentation"] = [[3, 3, 3, 3, 4, 3]]
    write_json(path, content)
    loader = open_evaluation(tmp_path, "refcoco|unc|train", EVAL)
    sample = loader.sample(0, np.random.default_rng(0))
    asked = [conversation.turns[0][0] for conversation in sample.conversations]
    assert len(asked) == len(layout[sample.id]) - 3 and not any("man" in text for text in asked)
    remarks = loader.options.faults.remarks
    assert sum("covers no pixel" in remark for remark in remarks) == 3


@pytest.mark.parametrize("name", ["ade20k", "cocostuff", "mapillary"])
def test_a_photo_of_nothing_but_void_stops_no_training(tmp_path, name):
    official.write_everything(tmp_path)
    loader = semantic_loader(tmp_path, name, LoaderOptions(LEVELS))
    path = loader.label_folder / loader.files[0][1]
    official.write_label(path, np.full_like(read_label(path), loader.kind.void).astype(np.uint8))
    with pytest.raises(NothingToAsk):
        loader.sample(0, np.random.default_rng(0))
    evaluated = open_evaluation(tmp_path, loader.dataset, EVAL)
    assert not evaluated.sample(0, np.random.default_rng(0)).conversations


def test_photos_of_partimagenet_in_folders_by_split(tmp_path):
    official.write_partimagenet(tmp_path)
    images = tmp_path / "vlpart/partimagenet/images"
    (photo,) = images.glob("*/*.JPEG")
    (images / "train").mkdir()
    photo.rename(images / "train" / photo.name)
    assert open_all(open_evaluation(tmp_path, "partimagenet|train", EVAL)) == 1


# ------------------------------------------------------------------------------------ --exclude_val


def test_ones_own_photos_of_coco_are_excluded_too(tmp_path, caplog):
    """By COCO's name of them, in any of its forms."""
    names = [
        f"{official.TRAIN:012d}.jpg",
        f"{official.VAL:012d}.jpg",
        f"COCO_train2014_{official.TEST_G:012d}.jpg",
        "mine.jpg",
    ]
    write_table(tmp_path, [{"image": name, "query": "q", "polygons": [FLAT]} for name in names])
    for name in names:
        write_image(tmp_path / "own/table/images" / name, SIZE)
        write_image(tmp_path / "reason_seg/Mine/train" / name, SIZE)
        record = {"text": "q", "shapes": [square(1, 1, 4, 4)]}
        write_json(tmp_path / f"reason_seg/Mine/train/{Path(name).stem}.json", record)
    options = LoaderOptions(LEVELS, excluded_coco=frozenset(official.EXCLUDED))
    with caplog.at_level("INFO"):
        for loader in (
            OwnData(tmp_path, "table", options),
            reasoning_loader(tmp_path, "Mine|train", options),
        ):
            kept = {loader.sample(i, np.random.default_rng(0)).id for i in range(len(loader))}
            assert kept == {f"{official.TRAIN:012d}", "mine"}
    assert caplog.text.count("2 of 4 entries are left out") == 2


def test_a_folder_called_as_the_references(tmp_path):
    official.write_everything(tmp_path)
    path = tmp_path / "refer_seg/refcoco/refs(unc).p"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"refs\(unc\).p: cannot be read"):
        open_evaluation(tmp_path, "refcoco|unc|val", EVAL)
