"""Many questions about many pictures, through the command."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO

from cores.dataset.files.text import read_json
from cores.dataset.mixture import EvalDataset
from cores.model import ReasoningSegmenter
from cores.utils import predicting
from cores.utils.evaluation import cli
from tests.scripted import scripted_model

QUESTIONS = ["where?", "say hello"]


def photo(path, seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)


@pytest.fixture
def photos(tmp_path):
    photo(tmp_path / "photos" / "a.png", 1)
    photo(tmp_path / "photos" / "a.bmp", 2)  # the same name but for its ending
    photo(tmp_path / "photos" / "在 sub" / "b.png", 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    photo(tmp_path / "photos" / "在 sub" / "turned.jpg", 4, exif=exif)
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    return tmp_path


def run(root, *changes, images="photos", prompts="questions.txt", out="out"):
    argv = ["--version", str(scripted_model()), "--max_new_tokens", "12"]
    argv += ["--images", str(root / images), "--out", str(root / out)]
    argv += ["--prompts", str(root / prompts)] if prompts else []
    return predicting.main([*argv, *map(str, changes)])


def rows(root, out="out"):
    return [json.loads(line) for line in (root / out / "answers.jsonl").read_text().splitlines()]


def test_every_answer_is_that_of_python_and_lies_in_every_file(photos, capsys):
    assert run(photos, "--overlay", "--batch_size", 3) == 0
    assert "8 answers with 4 masks" in capsys.readouterr().out
    segmenter = ReasoningSegmenter.from_pretrained(scripted_model(), max_new_tokens=12)
    found = rows(photos)
    assert {row["image"] for row in found} == {
        "a.png",
        "a.bmp",
        "在 sub/b.png",
        "在 sub/turned.jpg",
    }
    coco = COCO(photos / "out" / "coco.json")
    for row in found:
        result = segmenter(photos / "photos" / row["image"], row["question"])
        assert row["text"] == result.text and len(row["masks"]) == len(result.masks)
        assert (row["why_no_mask"] is None) == bool(result.masks)
        for mask, expected in zip(row["masks"], result.masks, strict=True):
            assert (rle_codec.decode(mask["rle"]) == expected.mask).all()
            pixels = np.asarray(Image.open(photos / "out" / mask["file"]))
            assert (pixels == 255 * expected.mask).all()
            (image,) = [i for i in coco.dataset["images"] if i["file_name"] == row["image"]]
            (entry,) = coco.imgToAnns[image["id"]]
            assert (coco.annToMask(entry) == expected.mask).all()
            assert coco.cats[entry["category_id"]]["name"] == row["question"]
    turned = next(row for row in found if "turned" in row["image"])
    assert turned["size"] == [32, 24]  # upright
    assert len(list((photos / "out" / "overlays").rglob("*.png"))) == 4
    whole = json.loads((photos / "out" / "predictions.json").read_text())
    assert [entry["image_id"] for entry in whole] == ["a.bmp", "a.png", "b", "turned"]


def test_it_goes_on_where_it_was_stopped(photos, monkeypatch, capsys):
    assert run(photos) == 0
    whole, file = rows(photos), photos / "out" / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of a line
    (photos / "out" / "coco.json").unlink()
    asked = []
    real = ReasoningSegmenter.__call__

    def counting(self, images, queries, *rest):
        asked.extend(text for texts in queries for text in texts)
        return real(self, images, queries, *rest)

    monkeypatch.setattr(ReasoningSegmenter, "__call__", counting)
    assert run(photos) == 0
    assert len(asked) == 5 and rows(photos)[:3] == whole[:3]
    key = lambda row: (row["image"], row["number"])  # noqa: E731
    assert sorted(rows(photos), key=key) == sorted(whole, key=key)
    assert len(COCO(photos / "out" / "coco.json").anns) == 4
    asked.clear()
    assert run(photos) == 0 and asked == []
    capsys.readouterr()
    assert run(photos, "--max_new_tokens", 5) == 2
    assert "another max_new_tokens" in capsys.readouterr().err


def test_a_broken_picture_is_left_out_by_name(photos, capsys):
    (photos / "photos" / "bad.jpg").write_bytes(b"no picture")
    assert run(photos, prompts=None) == 2
    assert "--prompts is missing" in capsys.readouterr().err
    assert run(photos, "--prompts", "where?", prompts=None) == 1
    shown = capsys.readouterr()
    assert "4 answers" in shown.out
    assert shown.err.count("left out:") == 1 and "bad.jpg" in shown.err
    (photos / "photos" / "bad.jpg").unlink()
    photo(photos / "photos" / "bad.jpg", 5)  # replaced by a good one
    assert run(photos, "--prompts", "where?", prompts=None) == 0
    assert "5 answers" in capsys.readouterr().out


@pytest.mark.parametrize("table", ["asked.jsonl", "asked.csv"])
def test_a_table_has_a_question_for_each_picture(photos, table):
    asked = [("photos/a.png", "where?"), ("photos/在 sub/b.png", "where, please?")]
    asked += [("photos/a.png", "where else?")]
    if table.endswith("csv"):
        text = "image,question\n" + "".join(f'{image},"{q}"\n' for image, q in asked)
    else:
        text = "".join(json.dumps({"image": image, "query": q}) + "\n" for image, q in asked)
    (photos / table).write_text(text, encoding="utf-8")
    assert run(photos, images=table, prompts=None) == 0
    assert {(row["image"], row["question"]) for row in rows(photos)} == set(asked)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "t.jsonl",
            '{"image": "a.png"}\n',
            't.jsonl:1: needs "image" and "question"; it has image',
        ),
        ("t.jsonl", "[1]\n", "t.jsonl:1: is not a JSON object"),
        ("t.csv", "photo,question\na,b\n", "it has photo, question"),
        ("t.jsonl", '{"image": "../../etc/a.png", "question": "?"}\n', ".."),
        ("t.jsonl", "\n", "the file is empty"),
        ("nowhere", None, "neither a folder nor a table"),
        ("empty", "", "neither a folder nor a table"),
    ],
)
def test_mistakes_are_one_line(photos, capsys, name, text, words):
    if text is not None:
        (photos / name).write_text(text)
    assert run(photos, images=name, prompts=None) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1


def test_a_folder_of_others_is_not_written_into(photos, capsys):
    (photos / "out").mkdir()
    (photos / "out" / "thesis.txt").write_text("")
    assert run(photos) == 2
    assert "holds other files" in capsys.readouterr().err


def test_answers_can_be_scored_and_trained_on(photos):
    """predictions.json against a data set of the same pictures; coco.json as own data."""
    (photos / "photos" / "a.bmp").unlink()
    (photos / "photos" / "在 sub" / "turned.jpg").unlink()
    assert run(photos, "--prompts", "where?", prompts=None) == 0
    own = photos / "data" / "own" / "answers"
    own.mkdir(parents=True)
    (photos / "photos").rename(own / "photos")
    coco = read_json(photos / "out" / "coco.json")
    for image in coco["images"]:
        image["file_name"] = f"photos/{image['file_name']}"
    (own / "val.json").write_text(json.dumps(coco))
    data = EvalDataset(photos / "data", "own:answers|val", ["SEG"])
    assert len(data) == 2 and data.loader.sample(0, np.random.default_rng(0)).conversations
    predictions = read_json(photos / "out" / "predictions.json")
    assert [entry["image_id"] for entry in predictions] == ["a", "b"]
    argv = ["--predictions", photos / "out" / "predictions.json", "--out", photos / "scored"]
    argv += ["--val_dataset", "own:answers|val", "--dataset_dir", photos / "data"]
    assert cli.main(["score", *map(str, argv)]) == 0
    assert json.loads((photos / "scored" / "metrics.json").read_text())["free"]["giou"] == 1.0
