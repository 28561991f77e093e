"""What an evaluation leaves behind: the page, the rows, the pictures, comparisons, and masks of
other systems."""

import csv
import dataclasses
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle_codec

from cores.dataset.annotations.masks import read_mask
from cores.dataset.files.errors import DataError
from cores.dataset.files.rle import encode_rle
from cores.dataset.mixture import EvalDataset
from cores.utils.evaluation import cli as evaluation_cli
from cores.utils.evaluation import measuring
from cores.utils.evaluation.predictions import Predictions, score_predictions
from cores.utils.evaluation.writer import write_reports
from cores.utils.metrics import TargetScore, breakdown, paired_bootstrap
from cores.utils.report import gallery, html
from cores.utils.report.compare import NotComparable, compare_targets, read_targets
from cores.utils.settings.programs import read_evaluation
from tests.backbone_toys import toys, trained_run
from tests.dataset_toys import write_image
from tests.helpers import LEVELS
from tests.utils.evaluation.test_evaluation import FirstRow, run, toy_data
from tests.utils.training.test_engine import launch

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>\u202e\x00\ud800"
    " & done"
)


def score(iou: float, image: int = 0, union: int = 100, **fields) -> TargetScore:
    known = {
        "dataset": "d",
        "id": str(image),
        "conversation": 0,
        "target": 0,
        "query": "q",
        "is_sentence": None,
        "extra_masks": 0,
    }
    known |= {
        "inter": round(iou * union),
        "union": union,
        "iou": iou,
        "emitted": True,
        "target_area": union,
        "image_area": 1000,
    }
    return TargetScore(**known | fields)


class Page(HTMLParser):
    """Everything that a browser would see of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def check_self_contained(page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.attributes("src"))
    assert not page.attributes("href")
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    policy = next(
        attrs["content"]
        for tag, attrs in page.tags
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy


# ---------------------------------------------------------------------------------------- the files


def written(root: Path, *, without_mask=("001",), **options) -> Path:
    """The folder of a whole evaluation in both modes."""
    data = toy_data(root / "data", count=4)
    reports = [
        run(FirstRow(without_mask=without_mask), data, mode, examples=1, gallery=2)
        for mode in ("free", "teacher_forced")
    ]
    write_reports(reports, data, root / "run", {"lr": 0.1}, seconds=1.0, **options)
    return root / "run"


def test_the_page_tells_what_the_numbers_say(tmp_path):
    page = Page(written(tmp_path, name="toy") / "report.html")
    check_self_contained(page)
    assert "toy on ReasonSeg|val" in page.words
    assert "39.6" in page.words  # (1 + 0 + 1/3 + 1/4) / 4
    for words in (
        "Free generation",
        "Teacher forced",
        "Worst answers",
        "Best answers",
        "Random answers",
        "whole image",
        "lr: 0.1",
    ):
        assert words in page.words, words
    # two modes × (worst, random, best of 2 and one without a mask), five tiles each
    assert len(page.attributes("src")) == 2 * (2 + 2 + 2 + 1) * 5
    assert "[LOC]" in page.words and "ground truth" in page.words
    assert re.search(r"All 1 targets? without a mask", page.words)


def test_text_of_data_and_models_stays_text(tmp_path, capsys):
    toy_data(tmp_path / "data", count=1)
    file = tmp_path / "data" / "reason_seg" / "ReasonSeg" / "val" / "000.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"text": [HOSTILE]}))
    answers = write_rles(tmp_path / "p.json", first_rows(1), answer=HOSTILE)
    argv = [
        "score",
        "--predictions",
        str(answers),
        "--dataset_dir",
        str(tmp_path / "data"),
        "--val_dataset",
        "ReasonSeg|val",
    ]
    assert evaluation_cli.main([*argv, "--name", HOSTILE, "--out", str(tmp_path / "run")]) == 0
    page = Page(tmp_path / "run" / "report.html")
    check_self_contained(page)
    assert page.words.count("<script>alert(1)</script>") >= 4  # title, heading, question, answer
    row = next(csv.DictReader((tmp_path / "run" / "targets-free.csv").open(encoding="utf-8")))
    assert "<script>" in row["query"] and "\x00" not in row["query"]
    assert (
        evaluation_cli.main(
            ["compare", *[str(tmp_path / "run")] * 2, "--html", str(tmp_path / "c.html")]
        )
        == 0
    )
    check_self_contained(Page(tmp_path / "c.html"))
    assert not set("\x00\u202e") & set(capsys.readouterr().out)


def test_rows_of_csv_and_json_agree(tmp_path):
    folder = written(tmp_path)
    rows = list(csv.DictReader((folder / "targets-free.csv").open(encoding="utf-8")))
    targets = json.loads((folder / "targets-free.json").read_text())["targets"]
    assert [row["id"] for row in rows] == ["000", "001", "002", "003"]
    assert [float(row["iou"]) for row in rows] == [target["iou"] for target in targets]
    assert list(rows[0]) == list(targets[0])
    assert rows[1]["first_iou"] == ""


def test_templates_escape_whatever_is_not_markup():
    template = html.TEMPLATES.from_string('<p title="{{ x }}">{{ x }}{{ [1, x] }}</p>{{ raw }}')
    page = template.render(x="<b>\"'&\x00\n", raw=template.render(x="<", raw=""))
    assert "<b>" not in page and "\x00" not in page and "\n" not in page
    assert page.startswith('<p title="&lt;b&gt;&#34;&#39;&amp;">')
    assert page.count("&amp;lt;") == 3, "what was rendered is a text like any other"
    for name in html.TEMPLATES.list_templates(extensions=["j2"]):
        source = (html.TEMPLATES_FOLDER / name).read_text(encoding="utf-8")
        assert "safe" not in re.findall(r"\w+", source), "no template switches the escaping off"


def test_groups_have_their_members_and_no_others():
    scores = [
        score(1.0, 0, target_area=5),
        score(0.5, 1, target_area=10),
        score(0.0, 2, target_area=0, query="a " * 30),
    ]
    found = breakdown(scores)
    sizes = {name: row["n"] for name, row in found["target_size"].items()}
    assert sizes == {"no target": 1, "under 1 % of the image": 1, "1–5 % of the image": 1}
    assert {name: row["giou"] for name, row in found["query_length"].items()} == {
        "1–8 words": 0.75,
        "25 words and more": 0.0,
    }
    assert found["query_kind"] == {}
    assert breakdown([score(1.0, image_area=None)])["target_size"] == {}


# ------------------------------------------------------------------------------------------ gallery


def test_a_gallery_keeps_the_extremes_and_draws_little(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        gallery, "draw_picture", lambda example, s: drawn.append(s.id) or gallery.Picture(s, [])
    )
    kept = gallery.Gallery(3, seed=1)
    order = np.random.default_rng(0).permutation(1000)
    for i in order:
        kept.offer((int(i), 0, 0), score(i / 1000, int(i), emitted=bool(i % 10)), lambda: None)
    ids = {
        kind: [picture.score.id for picture in pictures] for kind, pictures in kept.pictures.items()
    }
    assert (ids["worst"], ids["best"]) == (["1", "2", "3"], ["999", "998", "997"])
    assert all(int(i) % 10 == 0 for i in ids["without_mask"])
    assert len(set(ids["random"])) == 3
    assert len(drawn) < 120


def test_the_choice_does_not_depend_on_the_order_or_the_ranks(monkeypatch):
    monkeypatch.setattr(gallery, "draw_picture", lambda example, s: gallery.Picture(s, []))
    answers = [((i, 0, 0), score((i * 37 % 50) / 50, i, emitted=i % 4 > 0)) for i in range(60)]

    def keep(share) -> gallery.Gallery:
        kept = gallery.Gallery(4, seed=3)
        for order, answer in share:
            kept.offer(order, answer, lambda: None)
        return kept

    whole, merged = keep(answers), gallery.Gallery(4, seed=3)
    for rank in (2, 0, 1):
        merged.add(keep(answers[rank::3]).entries)
    assert merged.pictures == whole.pictures
    assert gallery.Gallery(0).pictures == {}


# -------------------------------------------------------------------------------------- comparisons


def test_paired_intervals_are_of_the_difference():
    rng = np.random.default_rng(0)
    easy = rng.random(200) * 0.6
    a = [score(float(x), i) for i, x in enumerate(easy)]
    b = [score(float(x) + 0.1, i) for i, x in enumerate(easy)]
    found = paired_bootstrap(a, b)["giou"]
    assert found["difference"] == pytest.approx(0.1)
    # every image differs by the same, so chance has no part in it
    assert found["ci95"] == pytest.approx([0.1, 0.1])
    assert found["share_above_zero"] == 1.0
    same = paired_bootstrap(a, a)
    assert (same["giou"]["ci95"], same["ciou"]["difference"]) == ([0.0, 0.0], 0.0)
    noise = [score(float(x), i) for i, x in enumerate(rng.permutation(easy))]
    low, high = paired_bootstrap(a, noise)["giou"]["ci95"]
    assert low < 0 < high
    with pytest.raises(ValueError, match="200 and 1"):
        paired_bootstrap(a, b[:1])


def test_two_systems_are_compared_target_by_target(tmp_path, capsys):
    a, b = (
        written(tmp_path / "a", without_mask=("000",), name="A<b>"),
        written(tmp_path / "b", without_mask=("003",), name="other"),
    )
    out = tmp_path / "out" / "compare.html"
    argv = [
        "compare",
        str(a / "targets-free.json"),
        str(b / "targets-free.json"),
        "--html",
        str(out),
        "--top",
        "1",
    ]
    capsys.readouterr()
    assert evaluation_cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "4 pairs of 4 images" in said
    # (1/2 + 1/3 + 1/4) / 4 and (1 + 1/2 + 1/3) / 4
    assert "39.6" not in said and "27.1" in said and "45.8" in said
    assert re.search(r"gained most:\n +\+100.0 +no mask → +100.0  000: ", said)
    assert re.search(r"lost most:\n +−25.0 +25.0 → +no mask  003: ", said)
    assert "B better on 1, worse on 1, equal on 2" in said
    page = Page(out)
    check_self_contained(page)
    assert "other against A<b>" in page.words
    assert sum(tag == "circle" and attrs.get("class") == "cloud" for tag, attrs in page.tags) == 4


def changed(path: Path, out: Path, **changes) -> Path:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value(content[key]) if callable(value) else value
    out.write_text(json.dumps(content))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset": "ReasonSeg|test"},
            "data set is 'ReasonSeg|val' in one, 'ReasonSeg|test' in the other",
        ),
        ({"mode": "teacher_forced"}, "mode is 'free'"),
        ({"texts": "all"}, "wordings is 'first'"),
        ({"targets": lambda t: t[:2]}, "has 2 targets that .* has not, such as ReasonSeg|val 002"),
        ({"targets": lambda t: t[:3] + t[:1]}, "has 1 targets"),
        ({"targets": lambda t: t + t[:1]}, "holds a target twice"),
        (
            {"targets": lambda t: [t[0] | {"target_area": 99}, *t[1:]]},
            "000.* has the target area 4 in one, 99 in the other",
        ),
        ({"targets": lambda t: [t[0] | {"query": "else"}, *t[1:]]}, "has the query"),
    ],
    ids=["dataset", "mode", "texts", "fewer", "other", "twice", "area", "query"],
)
def test_what_answers_other_questions_is_not_compared(tmp_path, changes, message):
    first = written(tmp_path) / "targets-free.json"
    second = changed(first, tmp_path / "second.json", **changes)
    with pytest.raises(NotComparable, match=message.replace("|", r"\|")):
        compare_targets(read_targets(first), read_targets(second))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", 'no list "targets"'),
        ('{"targets": [1], "dataset": "d", "texts": "first"}', 'no "mode"'),
        (
            '{"targets": [{"id": 1}], "dataset": "d", "texts": "first", "mode": "free"}',
            r"targets\[0\] has no conversation",
        ),
        ("[", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_report_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=f"a.json: .*{message}"):
        read_targets(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("id", 5), ("id", ["a"]), ("dataset", {}), ("query", None), ("conversation", [1]),
     ("target", 0.5), ("iou", 1.5), ("iou", True), ("inter", -1), ("union", float("nan")),
     ("emitted", "no")],
)  # fmt: skip
def test_a_row_with_another_kind_of_value_is_named(tmp_path, field, value):
    row = dataclasses.asdict(score(0.5)) | {field: value}
    content = {"dataset": "d", "texts": "first", "mode": "free", "targets": [row]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"a.json: targets\[0\].{field} is .*, expected "):
        read_targets(tmp_path / "a.json")


def test_rows_of_older_versions_are_read(tmp_path):
    """They called the masks beyond the targets "surplus"."""
    new = written(tmp_path, without_mask=()) / "targets-free.json"
    rows = json.loads(new.read_text())["targets"]
    old_rows = [{"surplus": row.pop("extra_masks") + 2} | row for row in rows]
    old = changed(new, tmp_path / "old.json", targets=old_rows)
    assert [s.extra_masks for s in read_targets(old).scores] == [2] * len(rows)
    assert compare_targets(read_targets(new), read_targets(old)).counts["equal"] == len(rows)


def test_a_folder_stands_for_its_only_file(tmp_path):
    folder = written(tmp_path)
    with pytest.raises(
        DataError, match="holds 2 files.*targets-free.json, targets-teacher_forced.json"
    ):
        read_targets(folder)
    (folder / "targets-teacher_forced.json").unlink()
    assert read_targets(folder).path == folder / "targets-free.json"


# ---------------------------------------------------------------------------------- masks of others


def first_rows(count: int) -> dict[str, np.ndarray]:
    """What FirstRow answers, by sample."""
    mask = np.zeros((10, 12), dtype=bool)
    mask[1, 1:5] = True
    return {f"{i:03d}": mask for i in range(count)}


def write_pngs(folder: Path, masks: dict[str, np.ndarray], value: int = 255) -> Path:
    folder.mkdir(parents=True)
    for name, mask in masks.items():
        assert cv2.imwrite(str(folder / f"{name}.png"), value * mask.astype(np.uint8))
    return folder


def write_rles(path: Path, masks: dict[str, np.ndarray], **fields) -> Path:
    rles = {
        name: rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
        for name, mask in masks.items()
    }
    entries = [
        {"image_id": name, "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
        | fields
        for name, rle in rles.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("kind", ["png", "ones", "json"])
def test_masks_of_another_system_score_as_ours_do(tmp_path, kind):
    data, masks = toy_data(tmp_path / "data"), first_rows(3)
    path = (
        write_rles(tmp_path / "p.json", masks)
        if kind == "json"
        else write_pngs(tmp_path / "p", masks, 1 if kind == "ones" else 255)
    )
    ours = run(FirstRow(), data)
    theirs = score_predictions(Predictions.read(path), data)
    assert [(s.id, s.inter, s.union, s.iou, s.target_area, s.query) for s in theirs.scores] == [
        (s.id, s.inter, s.union, s.iou, s.target_area, s.query) for s in ours.scores
    ]
    assert (theirs.summary["giou_ci95"], theirs.summary["ciou"]) == (
        ours.summary["giou_ci95"],
        ours.summary["ciou"],
    )
    assert theirs.mode == "free"


def test_scores_of_predictions_are_written_and_compared(tmp_path, capsys):
    ours = written(tmp_path, without_mask=())
    masks = first_rows(3)
    masks |= {"unheard-of": masks["000"]}
    argv = [
        "score",
        "--predictions",
        str(write_pngs(tmp_path / "p", masks)),
        "--dataset_dir",
        str(tmp_path / "data"),
    ]
    argv += ["--val_dataset", "ReasonSeg|val", "--out", str(tmp_path / "theirs"), "--name", "they"]
    capsys.readouterr()
    assert evaluation_cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "1 without a prediction, scored as no mask: 003" in said
    assert "1 predictions that belong to no target, left out: unheard-of" in said
    metrics = json.loads((tmp_path / "theirs" / "metrics.json").read_text())
    assert (metrics["missing_predictions"], metrics["unused_predictions"]) == (
        ["003"],
        ["unheard-of"],
    )
    assert metrics["free"]["giou"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 4)
    assert metrics["free"]["emission_rate"] == 0.75
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "metrics.json", "report.html", "examples.png", "targets-free.json", "targets-free.csv",
    }  # fmt: skip
    assert "[prediction]" in Page(tmp_path / "theirs" / "report.html").words
    assert (
        evaluation_cli.main(["compare", str(ours / "targets-free.json"), str(tmp_path / "theirs")])
        == 0
    )
    assert "−6.2" in capsys.readouterr().out  # a quarter of 1/4


def test_every_wording_has_its_own_prediction(tmp_path):
    data, mask = toy_data(tmp_path / "data", count=1, texts="all"), first_rows(1)["000"]
    predictions = Predictions.read(
        write_pngs(tmp_path / "p", {"000": mask, "000.1": ~mask, "000.1.1": mask})
    )
    report = score_predictions(predictions, data)
    assert [(s.conversation, s.iou, s.extra_masks) for s in report.scores] == [
        (0, 1.0, 0),
        (1, 0.0, 1),
    ]
    assert (predictions.missing, predictions.unused) == ([], [])
    entries = write_rles(tmp_path / "q.json", {"000": ~mask}, conversation=1, answer="there")
    report = score_predictions(Predictions.read(entries), data)
    assert [(s.iou, s.emitted, s.answer) for s in report.scores] == [
        (0.0, False, ""),
        (0.0, True, "there"),
    ]


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("000.png", lambda p: write_image(p, (10, 13), 255), "000.png: .*"),
        (
            "000.png",
            lambda p: cv2.imwrite(str(p), np.zeros((10, 13), np.uint8)),
            "000.png: the mask is 10×13 .* image is 10×12",
        ),
        (
            "000.png",
            lambda p: cv2.imwrite(str(p), np.arange(120, dtype=np.uint8).reshape(10, 12)),
            "000.png: a mask has two values",
        ),
        ("000.png", lambda p: p.write_bytes(b"no picture"), "000.png: not a readable image"),
        (
            "000.0.png",
            lambda p: cv2.imwrite(str(p), np.zeros((10, 12), np.uint8)),
            "000.0.png and 000.png are both predictions for 000",
        ),
    ],
    ids=["colour", "size", "grey", "broken", "twice"],
)
def test_a_wrong_prediction_is_named(tmp_path, name, write, message):
    data, folder = toy_data(tmp_path / "data"), write_pngs(tmp_path / "p", first_rows(3))
    write(folder / name)
    with pytest.raises(DataError, match=message):
        score_predictions(Predictions.read(folder), data)


def renamed(root: Path, *names: str) -> EvalDataset:
    """toy_data of samples called otherwise."""
    toy_data(root, count=len(names))
    folder = root / "reason_seg" / "ReasonSeg" / "val"
    for i, name in enumerate(names):
        for suffix in (".jpg", ".json"):
            (folder / f"{i:03d}{suffix}").rename(folder / f"{name}{suffix}")
    return EvalDataset(root, "ReasonSeg|val", LEVELS, exemplar_count=0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["a.0"],
            (
                r"a\.0\.png may be the prediction for a\.0 \(.*a\.0\.jpg\) and for a \(.*a\.jpg\);"
                r" give a JSON list"
            ),
        ),
        (
            ["a", "a.0"],
            r"a\.0\.png and a\.png are both predictions for a; keep one, or give a JSON list",
        ),
        (
            ["a", "a.0.1"],
            (
                r"a\.0\.1\.png may be the prediction for a\.0\.1\.0 \(.*a\.0\.jpg\) and for a\.0\.1"
                r" \(.*a\.jpg\)"
            ),
        ),
    ],
)
def test_a_file_that_two_images_may_claim_is_refused(tmp_path, capsys, files, message):
    renamed(tmp_path / "data", "a", "a.0")
    write_pngs(tmp_path / "p", dict.fromkeys(files, first_rows(1)["000"]))
    argv = ["score", "--predictions", str(tmp_path / "p"), "--dataset_dir", str(tmp_path / "data")]
    argv += [
        "--val_dataset",
        "ReasonSeg|val",
        "--eval_texts",
        "all",
        "--out",
        str(tmp_path / "out"),
    ]
    assert evaluation_cli.main(argv) == 2
    assert re.fullmatch(f"error: .*/p: {message}.*\n", capsys.readouterr().err)


def test_results_that_cannot_be_written_are_said_before_the_work(tmp_path, monkeypatch, capsys):
    toy_data(tmp_path / "data")
    monkeypatch.setattr(measuring, "score_predictions", None)
    argv = [
        "score",
        "--predictions",
        str(write_pngs(tmp_path / "p", first_rows(1))),
        "--dataset_dir",
        str(tmp_path / "data"),
    ]
    assert evaluation_cli.main([*argv, "--val_dataset", "ReasonSeg|val", "--out", "/dev/null"]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == "error: --out /dev/null: results cannot be written there (File exists); give another"
        " folder\n"
    )


def test_a_list_tells_such_images_apart(tmp_path):
    data, mask = renamed(tmp_path / "data", "a", "a.0"), first_rows(1)["000"]
    predictions = Predictions.read(write_rles(tmp_path / "p.json", {"a": mask, "a.0": ~mask}))
    assert [(s.id, s.iou > 0.1) for s in score_predictions(predictions, data).scores] == [
        ("a.0", False),
        ("a", True),
    ]
    assert (predictions.missing, predictions.unused) == ([], [])


def test_files_that_differ_in_the_ending_are_refused(tmp_path):
    data, folder = toy_data(tmp_path / "data"), write_pngs(tmp_path / "p", first_rows(1))
    (folder / "000.png").with_suffix(".PNG").write_bytes((folder / "000.png").read_bytes())
    with pytest.raises(
        DataError, match=r"000\.PNG and 000\.png are predictions for the same target; keep one"
    ):
        score_predictions(Predictions.read(folder), data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must be a list"),
        ([{"image_id": "000"}], r'\[0\] has no "segmentation"'),
        ([{"segmentation": {}}], r'\[0\] has no "image_id"'),
        ([{"image_id": "000", "segmentation": {}, "target": -1}], "whole numbers from 0"),
        ([{"image_id": "000", "segmentation": {}}] * 2, r"\[1\] is the second prediction for 000"),
        (
            [{"image_id": "000", "segmentation": {"size": [9, 9], "counts": "1"}}],
            r"\[0\].segmentation.* is 9×9",
        ),
        (
            [{"image_id": "000", "segmentation": {"size": ["ten", "12"], "counts": "1"}}],
            r'\[0\].segmentation" must be {"size"',
        ),
        (
            [{"image_id": "none", "segmentation": {}}],
            r"no prediction belongs to ReasonSeg\|val; found none, expected .*000, 001",
        ),
    ],
)
def test_a_wrong_list_of_predictions_is_named(tmp_path, content, message):
    data = toy_data(tmp_path / "data")
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"p.json: .*{message}"):
        score_predictions(Predictions.read(tmp_path / "p.json"), data)


def test_a_mask_may_be_a_palette_or_one_bit(tmp_path):
    from PIL import Image

    mask = first_rows(1)["000"]
    Image.fromarray(mask).save(tmp_path / "bit.png")
    indexed = Image.fromarray(mask.astype(np.uint8), mode="P")
    indexed.putpalette([0, 0, 0, 255, 0, 0])
    indexed.save(tmp_path / "palette.png")
    for name in ("bit.png", "palette.png"):
        assert np.array_equal(read_mask(tmp_path / name, (10, 12)), mask)


# ------------------------------------------------------------------------------------- command line


def test_a_run_is_measured_by_its_folder(tmp_path, capsys):
    argv = [
        str(trained_run()),
        "--out",
        str(tmp_path / "out"),
        "--eval_texts",
        "all",
        "--val_batch_size",
        "2",
        "--max_new_tokens",
        "8",
    ]
    assert evaluation_cli.main(argv) == 0
    before = json.loads((trained_run() / "metrics.json").read_text())
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (after["dataset"], after["texts"]) == ("Toy|val", "all")
    assert [after[mode]["giou"] for mode in ("free", "teacher_forced")] == [
        before[mode]["giou"] for mode in ("free", "teacher_forced")
    ]
    assert after["name"] == str(trained_run())
    assert (tmp_path / "out" / "report.html").is_file()
    argv = [
        "compare",
        str(trained_run() / "targets-free.json"),
        str(tmp_path / "out" / "targets-free.json"),
    ]
    assert evaluation_cli.main(argv) == 2
    assert "wordings is 'first' in one, 'all' in the other" in capsys.readouterr().err


def test_a_limit_holds_for_an_evaluation_only_where_it_is_typed(tmp_path):
    from cores.utils.settings.arguments import parse

    (tmp_path / "c.yaml").write_text("eval_limit: 3\n")
    flags = ["--config", str(tmp_path / "c.yaml")]
    assert parse(flags).eval_limit == 3
    assert parse(["--eval_only", *flags]).eval_limit == 0, (
        "as it is that of the evaluations between epochs"
    )
    assert parse(["--eval_only", *flags, "--eval_limit", "2"]).eval_limit == 2


def test_a_limited_evaluation_measures_its_baselines_on_the_same_images(tmp_path):
    argv = [
        str(trained_run()),
        "--out",
        str(tmp_path / "out"),
        "--eval_mode",
        "teacher_forced",
        "--eval_limit",
        "1",
    ]
    assert evaluation_cli.main(argv) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = json.loads((tmp_path / "out" / "targets-teacher_forced.json").read_text())["targets"]
    assert len({row["id"] for row in rows}) == 1
    assert found["teacher_forced"]["n"] == found["baselines"]["whole_image"]["n"] == len(rows)


def test_the_results_of_a_run_lie_in_it_by_default():
    s = measuring.settings_for(*read_evaluation([str(trained_run()), "--eval_mode", "free"]))
    assert s.run_dir == trained_run() / "eval" / "Toy-val"
    assert (s.eval_mode, s.eval_only, s.resume) == ("free", True, str(trained_run()))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/nowhere"], "/nowhere: no such folder"),
        (["."], "neither a run folder nor a checkpoint"),
        ([], "model"),
        (["compare", "/nowhere.json", "b"], "/nowhere.json"),
        (["compare", "a", "b", "--top", "-1"], "--top is -1"),
        (
            ["score", "--predictions", "/nowhere", "--val_dataset", "x|y", "--dataset_dir", "."],
            "/nowhere: does not exist",
        ),
        (["score"], "--predictions"),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys):
    assert evaluation_cli.main(argv) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_saved_masks_score_as_the_evaluation_did(tmp_path):
    model = [str(trained_run()), "--max_new_tokens", "12"]
    assert evaluation_cli.main([*model, "--save_masks", "--out", str(tmp_path / "a")]) == 0
    # The model of six steps gives none by itself.
    assert json.loads((tmp_path / "a" / "predictions-free.json").read_text()) == []
    masks = tmp_path / "a" / "predictions-teacher_forced.json"
    data = ["--dataset_dir", str(toys() / "data"), "--val_dataset", "Toy|val"]
    how = ["--eval_mode", "teacher_forced", "--out", str(tmp_path / "b")]
    assert evaluation_cli.main(["score", "--predictions", str(masks), *data, *how]) == 0
    ours, scored = (
        json.loads((tmp_path / name / "targets-teacher_forced.json").read_text())["targets"]
        for name in "ab"
    )
    names = ("id", "conversation", "target", "inter", "union", "iou", "emitted")
    assert [[row[k] for k in names] for row in ours] == [[row[k] for k in names] for row in scored]
    assert any(row["inter"] for row in ours)
    # Masks of an earlier evaluation do not stay beside the results of another one.
    assert evaluation_cli.main([*model, "--out", str(tmp_path / "a")]) == 0
    assert not list((tmp_path / "a").glob("predictions-*"))


def test_what_changed_most_is_shown_where_masks_were_kept(tmp_path, monkeypatch):
    """A scores all that is asked for in one quarter, B in the next."""
    data = ["--dataset_dir", str(toys() / "data"), "--val_dataset", "Toy|val"]
    dataset = EvalDataset(toys() / "data", "Toy|val", ["SEG"])
    for name, rows in (("a", slice(0, 1)), ("b", slice(0, 40))):
        entries = []
        for index in range(len(dataset)):
            sample = dataset[index]
            for number, conversation in enumerate(sample.conversations):
                mask = np.zeros(sample.image.shape[:2], bool)
                mask[rows] = conversation.masks[0][rows]
                entry = {"image_id": sample.id, "conversation": number, "target": 0}
                entries.append(entry | {"segmentation": encode_rle(mask)})
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(entries))
        argv = ["score", "--predictions", str(file), *data, "--out", str(tmp_path / name)]
        assert evaluation_cli.main(argv) == 0
        shutil.copy(file, tmp_path / name / "predictions-free.json")
    page_file = tmp_path / "compare.html"
    compare = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page_file)]
    assert evaluation_cli.main(compare) == 0
    page = Page(page_file)
    check_self_contained(page)
    gains = len(compare_targets(*(read_targets(tmp_path / n) for n in "ab")).gains)
    assert gains and len(page.attributes("src")) == 4 * gains
    assert "hit" in page.words and "A: IoU" in page.words
    # Without the masks, or without the pictures, the page says so.
    (tmp_path / "b" / "predictions-free.json").rename(tmp_path / "kept")
    assert evaluation_cli.main(compare) == 0
    assert "No pictures: " in Page(page_file).words and "--save_masks" in Page(page_file).words
    (tmp_path / "kept").rename(tmp_path / "b" / "predictions-free.json")
    metrics = tmp_path / "a" / "metrics.json"
    metrics.write_text(metrics.read_text().replace(str(toys() / "data"), "/nowhere"))
    assert evaluation_cli.main(compare) == 0
    assert "cannot be opened" in Page(page_file).words and not Page(page_file).attributes("src")


def test_the_page_of_a_training_has_its_curves_and_every_target():
    page = Page(trained_run() / "report.html")
    check_self_contained(page)
    assert [tag for tag, _ in page.tags].count("polyline") == 2
    assert "Loss of the steps" in page.words and "step 6" in page.words
    rows = json.loads((trained_run() / "targets-free.json").read_text())["targets"]
    assert f"All {len(rows)} targets" in page.words


@pytest.mark.slow
def test_two_real_ranks_write_what_one_writes(tmp_path):
    flags = [str(trained_run()), "--eval_mode", "teacher_forced", "--save_masks", "--out"]
    assert evaluation_cli.main([*flags, str(tmp_path / "one")]) == 0
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        "-m",
        "cores.utils.evaluation",
    ]
    found = launch(*launcher, *flags, tmp_path / "two")
    assert found.returncode == 0, found.stderr
    for file, key in (("targets", "targets"), ("predictions", slice(None))):
        one, two = (
            json.loads((tmp_path / name / f"{file}-teacher_forced.json").read_text())
            for name in ("one", "two")
        )
        assert one[key] == two[key] != []
