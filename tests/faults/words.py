"""Queries, predictions, settings and chat."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_codec

from cores import chat, train_ds
from cores.dataset import check
from cores.dataset.files.rle import encode_rle
from cores.dataset.mixture import EvalDataset
from cores.utils.evaluation import cli as evaluation
from cores.utils.precompute import boxes_to_masks
from cores.utils.settings.arguments import parse
from tests.faults.case import case
from tests.scripted import scripted_model


def said(run, *argv: str) -> tuple[int, str]:
    """(exit code, all that a command prints)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run(list(argv))
    return code, out.getvalue()


def conversation(folder: Path, *lines: str) -> list[str]:
    """What the chat prints for lines that are typed one after the other, the first of them about
    the picture "a photo.jpg" of ``folder``."""
    argv = ["--version", str(scripted_model()), "--vis_save_path", str(folder / "out")]
    with mock.patch("builtins.input", side_effect=[*lines, "quit"]), contextlib.chdir(folder):
        code, text = said(chat.main, *argv, "--max_new_tokens", "12")
    assert code == 0
    return text.splitlines()


@case(
    "a config that Notepad saved with a BOM, with lr: 1e-4, which YAML 1.1 takes for a text",
    "right",
    "both are read; 1e-4 is a number",
)
def numbers_of_a_config(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("lr: 1e-4\nepochs: 0\n", encoding="utf-8-sig")
    code, text = said(train_ds.main, "--config", str(config))
    assert code == 2 and "--epochs is 0" in text and "--lr" not in text


@case(
    "lists, references, depth without end, a key twice, a tab in a config",
    "refused",
    "one line with the file, the line and the column",
)
def what_a_config_cannot_hold(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    for text in ("lr: [1]", "lr: &a 1\nseed: *a", "[" * 50_000, "lr: 1\nlr: 2", "lr:\t1"):
        config.write_text(text)
        code, shown = said(train_ds.main, "--config", str(config))
        assert code == 2 and len(shown.splitlines()) == 1
        assert str(config) in shown and "column" in shown


@case(
    "nan, inf, negative and absurdly large numbers on the command line",
    "refused",
    "at once, by the name of the flag and what it may be",
)
def numbers_that_would_fail_later(tmp_path: Path) -> None:
    for flag, value in (
        ("lr", "inf"),
        ("max_grad_norm", "nan"),
        ("seed", "-1"),
        ("batch_size", "1000000000"),
        ("sam_cache_gb", "inf"),
        ("level_loss_weights", "nan,1"),
        ("exp_name", ""),
    ):
        code, shown = said(train_ds.main, f"--{flag}={value}")
        assert code == 2 and len(shown.splitlines()) == 1 and f"--{flag}" in shown


@case(
    "--text_projection_norm none, as an error message advises",
    "right",
    "is taken as none, over a number of the config too",
)
def the_word_none(tmp_path: Path) -> None:
    code, shown = said(train_ds.main, "--text_projection_norm", "none", "--epochs", "0")
    assert code == 2 and "--epochs is 0" in shown


@case(
    "a picture's path as a terminal drops it: escaped, quoted, as file://",
    "right",
    "the picture is opened",
)
def paths_as_terminals_drop_them(tmp_path: Path) -> None:
    pixels = np.zeros((24, 32, 3), np.uint8)
    for name in ("photo (1).jpg", "it's.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
    address = (tmp_path / "photo (1).jpg").as_uri()
    lines = (r"photo\ \(1\).jpg", r"'it'\''s.jpg'", address)
    shown = conversation(tmp_path, *lines)
    assert sum("32 × 24 pixels" in line for line in shown) == 3


@case(
    "a mistyped path, a path of Windows, an address of the web, in a conversation",
    "refused",
    "each is told as what it is, with near names of files; none is asked as a question",
)
def paths_with_slips(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(tmp_path / "truck.jpg")
    slips = ("trcuk.jpg", "C:\\me\\dog.jpg", "https://example.com/a.jpg", "/some/path")
    shown = conversation(tmp_path, "truck.jpg", *slips)
    errors = [line for line in shown if line.startswith("error:")]
    assert len(errors) == 4
    assert "did you mean truck.jpg" in errors[0] and "Windows" in errors[1]
    assert "download" in errors[2]
    assert not list((tmp_path / "out").glob("*.png"))


def own_rows(folder: Path, questions: list[str]) -> None:
    """The data set own:asked with one question about each of as many pictures."""
    root = folder / "own" / "asked"
    root.mkdir(parents=True)
    rows = []
    for number, question in enumerate(questions):
        Image.fromarray(np.full((24, 32, 3), 9, np.uint8)).save(root / f"{number}.png")
        square = [[4, 4, 12, 4, 12, 12, 4, 12]]
        rows.append({"image": f"{number}.png", "query": question, "polygons": square})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "val.jsonl").write_text(lines, encoding="utf-8")


@case(
    "one of four queries of an evaluation set is longer than the model reads",
    "refused",
    "before the first answer, with the picture, its tokens, the limit and the flag",
)
def one_long_query(tmp_path: Path) -> None:
    own_rows(tmp_path, ["the box", "the box", "the box", "the box that " + "is red and " * 400])
    argv = ["--dataset_dir", str(tmp_path), "--val_dataset", "own:asked|val", "--exp_name", "long"]
    argv += ["--log_base_dir", str(tmp_path / "runs"), "--precision", "fp32"]
    code, shown = said(evaluation.main, str(scripted_model()), *argv)
    errors = [line for line in shown.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1, shown
    assert "1 of 4 images" in errors[0] and "3.png" in errors[0], shown
    assert "free" not in shown, "it had begun to answer"


@case(
    "queries in Japanese, Chinese, Arabic, Hindi, with the final signs of these scripts",
    "right",
    "asked as written; sheets are drawn with a font of the machine, or with the codes of letters"
    " that no font has and a warning that says what to install",
)
def queries_in_other_scripts(tmp_path: Path) -> None:
    texts = [
        "赤い箱を示してください。",
        "请指出红色的箱子？",
        "أين الصندوق الأحمر؟",
        "लाल डिब्बा दिखाइए।",
    ]
    own_rows(tmp_path, texts)
    data = EvalDataset(tmp_path, "own:asked|val", ["LOC", "SEG"])
    for index, text in enumerate(texts):
        assert data[index].conversations[-1].turns[-1][0].startswith(text)
    argv = ["--dataset_dir", str(tmp_path), "--all"]
    code, shown = said(check.main, *argv, "--out", str(tmp_path / "sheets"))
    assert code == 0 and list((tmp_path / "sheets").glob("*.png")), shown


def boxes_of_coco(folder: Path) -> dict[tuple[int, int], np.ndarray]:
    """The data set coco|val2017 in ``folder``, as COCO numbers and names it. (image, category) ->
    mask, bool (H, W)."""
    root, size = folder / "coco", (24, 32)
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    corners = {(139, 1): (2, 3, 12, 20), (139, 6): (15, 4, 30, 22), (285, 1): (5, 5, 20, 20)}
    images, annotations, masks = {}, [], {}
    for number, ((image, category), (x0, y0, x1, y1)) in enumerate(corners.items(), 1):
        name = f"{image:012}.jpg"
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(root / "val2017" / name)
        images[image] = {"id": image, "file_name": name, "height": size[0], "width": size[1]}
        outline = [x0, y0, x1, y0, x1, y1, x0, y1]
        annotations.append({"id": number, "image_id": image, "category_id": category})
        annotations[-1] |= {"segmentation": [outline], "iscrowd": 0}
        drawn = rle_codec.frPyObjects([outline], *size)
        masks[image, category] = rle_codec.decode(drawn)[..., 0].astype(bool)
    names = [{"id": 1, "name": "person"}, {"id": 6, "name": "bus"}]
    content = {"images": [*images.values()], "annotations": annotations, "categories": names}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return masks


def score_of(folder: Path, predictions: object, name: str = "p") -> tuple[int, str]:
    """(exit code, what is said) of the command that scores a list, or a folder, of predictions on
    the data set of ``folder``."""
    path = predictions
    if not isinstance(predictions, Path):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(predictions))
    argv = ["score", "--predictions", str(path), "--dataset_dir", str(folder), "--gallery", "0"]
    argv += ["--examples", "0", "--val_dataset", "coco|val2017", "--out", str(folder / "out")]
    return said(evaluation.main, *argv)


def free_score(shown: str) -> str:
    return next(line.split()[1] for line in shown.splitlines() if line.startswith("free"))


@case(
    "COCO's results list: image_id 139 for 000000000139.jpg, several categories of an image,"
    " counts as str(bytes), polygons; PNGs with three equal channels",
    "right",
    "each entry answers the question about its category",
)
def results_of_other_systems(tmp_path: Path) -> None:
    masks, entries = boxes_of_coco(tmp_path), []
    folder = tmp_path / "pngs"
    folder.mkdir()
    for (image, category), mask in reversed(masks.items()):
        runs = encode_rle(mask)
        runs["counts"] = str(runs["counts"].encode())
        entries.append({"image_id": image, "category_id": category, "segmentation": runs})
        suffix = ".1" if category == 6 else ""
        grey = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
        Image.fromarray(grey).save(folder / f"{image:012}{suffix}.png")
    # "285" of a table that was read as floats, and polygons instead of run lengths.
    outline = [[5, 5, 20, 5, 20, 20, 5, 20]]
    entries[0] |= {"image_id": 285.0, "segmentation": outline, "score": 0.5}
    for predictions in (entries, folder):
        code, shown = score_of(tmp_path, predictions)
        assert code == 0 and free_score(shown) == "100.0", shown
        assert "without a prediction" not in shown and "no target" not in shown


@case(
    "predictions of half the size, two detections of one category, a category that the data do not"
    " have, a.png beside a.0.png",
    "refused",
    "by file or entry, with what to do",
)
def results_that_may_mean_two_things(tmp_path: Path) -> None:
    masks = boxes_of_coco(tmp_path)
    whole, small = encode_rle(masks[139, 1]), encode_rle(masks[139, 1][::2, ::2])
    entry = {"image_id": 139, "category_id": 1, "segmentation": whole}
    for entries, words in (
        ([entry | {"segmentation": small}], "12×16"),
        ([entry, entry], "[1] is the second prediction for 139, category 1"),
        ([entry | {"category_id": 0}], '"category_id" 0 is no category of coco|val2017'),
        ([entry, {"image_id": "000000000139", "segmentation": whole}], "are both predictions"),
        ({"annotations": [entry]}, "give its list of annotations"),
    ):
        code, shown = score_of(tmp_path, entries)
        assert code == 2 and len(shown.splitlines()) == 1 and words in shown, shown
    folder = tmp_path / "pngs"
    folder.mkdir()
    for name in ("000000000139.png", "000000000139.0.png"):
        Image.fromarray(masks[139, 1]).save(folder / name)
    code, shown = score_of(tmp_path, folder)
    assert code == 2 and "are both predictions for 000000000139; keep one" in shown


def boxes_file(folder: Path, *boxes: tuple[object, list[float]], **fields: object) -> list[str]:
    """The command that makes masks of ``boxes``, (image_id, bbox), of the photos cam1/0001.jpg and
    cam2/0001.jpg. ``fields``: of both images, None for one that is not there."""
    images = []
    for number in (1, 2):
        place = folder / "images" / f"cam{number}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.full((24, 32, 3), 90 * number, np.uint8)
        Image.fromarray(pixels).save(place / "0001.png")
        image = {"id": number, "file_name": f"cam{number}/0001.png", "height": 24, "width": 32}
        images.append({k: v for k, v in (image | fields).items() if v is not None})
    entries = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": box}
        for n, (image, box) in enumerate(boxes, 1)
    ]
    content = {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "car"}]}
    (folder / "boxes.json").write_text(json.dumps(content))
    argv = ["--annotations", str(folder / "boxes.json"), "--images", str(folder / "images")]
    sam = Path(__file__).parents[2] / "assets" / "tiny" / "sam"
    return [*argv, "--vision_pretrained", str(sam), "--out", str(folder / "new" / "masks.json")]


@case(
    "boxes of a detector whose photos lie in subfolders, one box of height 0",
    "right",
    "masks for all other boxes; that box is left out and named",
)
def boxes_in_subfolders(tmp_path: Path) -> None:
    square = [4, 4, 12, 12]
    argv = boxes_file(tmp_path, (1, square), (2, [4, 4, 12, 0]), (2.0, square))
    code, shown = said(boxes_to_masks.main, *argv)
    assert code == 0 and "2 new masks" in shown and "annotation 2 is left out" in shown, shown
    after = json.loads((tmp_path / "new" / "masks.json").read_text())["annotations"]
    assert [entry["id"] for entry in after] == [1, 3]
    assert all(entry["segmentation"]["size"] == [24, 32] for entry in after)


@case(
    "boxes of a detector without file_name, without image_id, without any photo or area, or with"
    " nothing left to do",
    "refused",
    "before the work, by the entry and the field",
)
def boxes_without_names(tmp_path: Path) -> None:
    square = [4, 4, 12, 12]
    for boxes, fields, words in (
        ([(1, square)], {"file_name": None}, 'image 1 has no "file_name"'),
        ([(None, square)], {}, 'annotation 1: "image_id" is None'),
        ([(1, square)], {"file_name": "gone.jpg"}, "none of its 1 photos is there"),
        ([(1, square), (2, square)], {"file_name": "cam1/0001.png"}, "are both"),
        ([(1, [4, 4, 0, 12])], {}, "no box has an area"),
        ([], {}, "nothing to do"),
    ):
        code, shown = said(boxes_to_masks.main, *boxes_file(tmp_path, *boxes, **fields))
        errors = [line for line in shown.splitlines() if line.startswith("error:")]
        assert code == 2 and len(errors) == 1 and words in errors[0], shown
        assert not (tmp_path / "new" / "masks.json").exists()


@case(
    "a system that never answers with a mask, or only with empty ones",
    "right",
    "the scores, and a warning in the summary and in report.html",
)
def no_answer_is_said_loudly(tmp_path: Path) -> None:
    boxes_of_coco(tmp_path)
    empty = encode_rle(np.zeros((24, 32), bool))
    entries = [{"image_id": 285, "category_id": 1, "segmentation": empty}]
    code, shown = score_of(tmp_path, entries)
    assert code == 0 and "WARNING, free: every mask that was answered is empty (1 of 3" in shown
    assert "every mask that was answered is empty" in (tmp_path / "out/report.html").read_text()


@case(
    "file names that a terminal or a spreadsheet would run: escapes, =HYPERLINK(…)",
    "right",
    "shown without control characters; a cell of the table begins with an apostrophe",
)
def names_that_would_run(tmp_path: Path) -> None:
    masks = boxes_of_coco(tmp_path)
    source = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(source.read_text())
    names = dict(
        zip(("000000000139", "000000000285"), ("=HYPERLINK(1)", "\x1b]0;gone\x07"), strict=True)
    )
    for image in content["images"]:
        old = image["file_name"]
        image["file_name"] = f"{names[old[:-4]]}.jpg"
        place = tmp_path / "coco" / "val2017"
        (place / old).rename(place / image["file_name"])
    source.write_text(json.dumps(content))
    runs = encode_rle(masks[139, 1])
    entries = [{"image_id": 139, "category_id": 1, "segmentation": runs}]
    code, shown = score_of(tmp_path, entries)
    assert code == 0 and "gone" in shown and "\x1b" not in shown and "\x07" not in shown, shown
    assert "'=HYPERLINK(1)" in (tmp_path / "out" / "targets-free.csv").read_text()


@case(
    "--fix-list, --out and --html in folders that do not exist, or where nothing can be written",
    "right",
    "the folder is made before the work; where that fails, one line with the flag, before the work",
)
def files_in_new_folders(tmp_path: Path) -> None:
    own_rows(tmp_path, ["the box"])
    argv, new = ["--dataset_dir", str(tmp_path), "--fix-list"], tmp_path / "new" / "a" / "bad.jsonl"
    code, shown = said(check.main, *argv, str(new))
    assert code == 0 and new.is_file(), shown
    (tmp_path / "file").write_text("")
    code, shown = said(check.main, *argv, str(tmp_path / "file" / "bad.jsonl"))
    assert code == 2 and len(shown.splitlines()) == 1 and "--fix-list" in shown, shown


@case(
    "skipped.jsonl of an earlier run in the folder of a new run of the same name",
    "right",
    "is removed before the new run opens its data, so that only its own bad items are counted",
)
def stale_list_of_bad_items(tmp_path: Path) -> None:
    own_rows(tmp_path, ["the box"])
    stale = tmp_path / "runs" / "again" / "skipped.jsonl"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"dataset": "own:asked", "item": "gone.png", "reason": "missing"}\n')
    argv = ["--version", str(scripted_model()), "--dataset_dir", str(tmp_path), "--own_data"]
    argv += [
        "none",
        "--dataset",
        "own",
        "--sample_rates",
        "1",
        "--exp_name",
        "again",
        "--no_eval",
        "--precision",
        "fp32",
    ]
    code, shown = said(train_ds.main, *argv, "--log_base_dir", str(tmp_path / "runs"))
    assert code == 2 and "own/none" in shown and not stale.exists(), shown


@case(
    "a ~ or a $VARIABLE in a path that no shell has replaced (--dataset_dir=~/data, YAML)",
    "right",
    "replaced as a shell does",
)
def unexpanded_paths(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("dataset_dir: ~/data\nlog_base_dir: $PLACE/runs\n")
    with mock.patch.dict(os.environ, {"HOME": "/home/me", "PLACE": "/big"}):
        s = parse(["--config", str(config), "--sam_cache", "~/cache"])
    assert (s.dataset_dir, s.log_base_dir, s.sam_cache) == (
        "/home/me/data",
        "/big/runs",
        "/home/me/cache",
    )


@case(
    "a flag that lost its $VARIABLE (--version=), a blank after a backslash, two evaluation sets",
    "refused",
    "each is told as what it is",
)
def lost_words(tmp_path: Path) -> None:
    for argv, words in (
        (["--version="], "--version is missing or empty"),
        (["--epochs", "1", " "], "empty or blank"),
    ):
        code, shown = said(train_ds.main, *argv)
        assert code == 2 and len(shown.splitlines()) == 1 and words in shown, shown
    with pytest.raises(ValueError, match="one evaluation set at a time"):
        EvalDataset(tmp_path, "Toy|val||own:x|val", ["SEG"])


@case(
    "questions piped from a script of Windows: BOM, CRLF, /IMAGE in capitals",
    "right",
    "read as if typed",
)
def a_script_from_windows(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(tmp_path / "truck.jpg")
    shown = conversation(tmp_path, "\ufefftruck.jpg", "/IMAGE truck.jpg\r", "QUIT\r")
    assert sum("32 × 24 pixels" in line for line in shown) == 2
    assert not any(line.startswith("error") for line in shown)
