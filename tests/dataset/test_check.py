"""The check of data sets, what training does with its list, the examples of docs/data.md, and names
that would leave the folder."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cores import train_ds
from cores.dataset import check
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.faults import BadItem, Faults, read_skip_list, write_skip_list
from cores.dataset.registry import OFFICIAL, entries, open_evaluation
from cores.dataset.sample import LoaderOptions
from tests import official_layouts as official
from tests.backbone_toys import flags, toys, write_data
from tests.dataset_toys import LEVELS, write_image, write_json
from tests.own_toys import write_table

ROOT = Path(__file__).resolve().parents[2]
EVAL = LoaderOptions(LEVELS, training=False)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """Every published data set in miniature; do not change it."""
    root = tmp_path_factory.mktemp("everything")
    official.write_everything(root)
    return root


# ---------------------------------------------------------------------------------------- the check


def test_every_published_set_is_known_and_clean(everything, tmp_path, capsys):
    assert (
        check.main(
            [
                "--dataset_dir",
                str(everything),
                "--all",
                "--out",
                str(tmp_path),
                "--fix-list",
                str(tmp_path / "bad"),
            ]
        )
        == 0
    )
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    findings, _ = check.inspect_all(everything, 1)
    names = {finding.name.split("|")[0] for finding in findings if finding.images}
    assert {entry.name for entry in OFFICIAL} - names <= {
        "synthreason",
        "vqa",
    }, "all but those that the layouts do not hold"
    assert all(finding.is_clean for finding in findings) and read_skip_list(tmp_path / "bad") == []
    assert (
        "queries" in lines["refcoco|unc|train"] and (tmp_path / "refcoco-unc-train.png").is_file()
    )
    for path in tmp_path.glob("*.png"):
        assert Image.open(path).size[0] > 200


def test_what_is_missing_is_named_as_it_is_published(everything, tmp_path, capsys):
    (tmp_path / "ade20k" / "images" / "training").mkdir(parents=True)
    write_image(tmp_path / "ade20k" / "images" / "training" / "a.jpg")
    assert check.main(["--dataset_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"ade20k\|training +incomplete: ade20k/annotations/training/ is not there", shown
    )
    assert re.search(
        r"refcocog +refer_seg/refcocog/refs\(\{umd,google\}\).p, refer_seg/refcocog/instances.json",
        shown,
    )


def test_counts_by_hand(tmp_path):
    shape = {"polygons": [2, 2, 6, 2, 6, 5]}
    rows = [{"image": "0.jpg", "query": f"q{i}", **shape} for i in range(3)] + [
        {"image": "1.jpg", "query": "no", "polygons": []}
    ]
    write_table(tmp_path, [*rows, {"image": "1.jpg", "query": "two", "targets": [shape, shape]}])
    (finding,), _ = check.inspect_all(tmp_path, None, ["own:table"])
    assert (finding.name, finding.images, finding.opened) == ("own:table|train", 2, 2)
    assert finding.counts == {"queries": 5, "targets": 6, "empty": 1}
    assert finding.line() == "2 images, 2 opened: 5 queries, 6 targets (1 empty)"
    assert check.inspect_all(tmp_path, 1, ["own:table"])[0][0].opened == 1


def test_a_wrong_call_ends_with_2(tmp_path, capsys):
    assert check.main(["--dataset_dir", str(tmp_path / "nowhere")]) == 2
    assert check.main(["--dataset_dir", str(tmp_path), "--only", "mars"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors] == [
        "error"
    ] * 2 and "--only mars: no such data set" in errors[1]
    for wrong in (["--nonsense"], ["--dataset_dir", str(tmp_path), "--samples", "0"]):
        assert check.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_users_sets_are_found(tmp_path):
    write_table(tmp_path)
    write_data(tmp_path)
    write_json(
        tmp_path / "coco" / "annotations" / "instances_mine.json",
        {"images": [], "annotations": [], "categories": []},
    )
    found = {(entry.name, *entry.splits) for entry in entries(tmp_path)[len(OFFICIAL) :]}
    assert found == {("own:table", "train"), ("Toy", "train", "val"), ("coco", "mine")}


# ----------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, set[str]]:
    """20 images with a JSON each, 2 of the 40 files broken: one is noticed at the start, one when
    it is drawn."""
    root = write_data(tmp_path_factory.mktemp("damaged"), train=20)
    folder = root / "reason_seg" / "Toy" / "train"
    (folder / "003.jpg").write_bytes((folder / "003.jpg").read_bytes()[:300])
    record = json.loads((folder / "011.json").read_text())
    write_json(folder / "011.json", record | {"target_rle": {"size": [24, 32], "counts": [5]}})
    return root, {f"reason_seg/Toy/train/{name}" for name in ("003.jpg", "011.json")}


def train(damaged: Path, name: str, **changes: object) -> tuple[int, Path]:
    changes = {"exp_name": name, "batch_size": 8, "steps_per_epoch": 5, "no_eval": "true"} | changes
    return train_ds.main(flags(toys(), dataset_dir=damaged, **changes)), toys() / "runs" / name


def steps(run: Path) -> int:
    return sum(
        json.loads(line)["kind"] == "train" for line in (run / "log.jsonl").read_text().splitlines()
    )


def test_training_over_broken_files_leaves_out_exactly_these(damaged, capsys):
    root, bad = damaged
    assert train(root, "strict")[0] == 2
    assert "003.jpg: not a readable image" in capsys.readouterr().err
    code, run = train(root, "tolerant", on_bad_sample="skip", workers=1)
    assert code == 0 and steps(run) == 10
    skipped = read_skip_list(run / "skipped.jsonl")
    assert {item.item for item in skipped} == bad and len(skipped) == 2
    assert all(
        item.dataset == "Toy|train" and Path(item.item).name in item.reason for item in skipped
    )
    assert "2 bad items were left out" in capsys.readouterr().out


def test_training_with_a_skip_list_meets_nothing_bad(damaged, tmp_path, caplog):
    root, bad = damaged
    listed = tmp_path / "bad.jsonl"
    assert check.main(["--dataset_dir", str(root), "--all", "--fix-list", str(listed)]) == 1
    assert {item.item for item in read_skip_list(listed)} == bad
    code, run = train(root, "listed", skip_list=listed)
    assert code == 0 and steps(run) == 10 and not (run / "skipped.jsonl").exists()
    assert "bad.jsonl: has 2 items, left out: 2 of Toy|train" in caplog.text


def spoil(path: Path, *place: object, **fields: object) -> None:
    """Changes one entry of a JSON; a field that becomes ... goes."""
    content = entry = json.loads(path.read_text())
    for key in place:
        entry = entry[key]
    entry.update(fields)
    for name in [name for name, value in entry.items() if value is ...]:
        del entry[name]
    path.write_text(json.dumps(content))


VQA, COCO = "vqa|llava_instruct_150k", "coco|train2017"
RECORDS = "llava_dataset/llava_instruct_150k.json"
INSTANCES = "coco/annotations/instances_train2017.json"
PACO = "vlpart/paco/annotations/paco_lvis_v1_train.json"
REFERRED = "refer_seg/grefcoco/instances.json"
REFERENCES = "refer_seg/grefcoco/grefs(unc).json"
QUESTIONS = "reason_seg/LLM-Seg40K/train.json"
EXPLAINED = "reason_seg/ReasonSeg/explanatory/train.json"
BAD_RECORD = 'record 1: "conversations" must be pairs of a human and a gpt message'


@pytest.mark.parametrize(
    ("spec", "file", "place", "fields", "item", "reason", "lost"),
    [
        (VQA, RECORDS, [1], {"conversations": ...}, f"{RECORDS}:record 1", BAD_RECORD, 1),
        (VQA, RECORDS, [1], {"conversations": [3]}, f"{RECORDS}:record 1", BAD_RECORD, 1),
        (VQA, RECORDS, [1], {"conversations": "talk"}, f"{RECORDS}:record 1", BAD_RECORD, 1),
        (
            VQA,
            RECORDS,
            [1],
            {"conversations": [3, 4]},
            f"{RECORDS}:record 1",
            "record 1: message 0 must be",
            1,
        ),
        (VQA, RECORDS, [1], {"image": 7}, f"{RECORDS}:record 1", 'record 1 has no text "image"', 1),
        (
            COCO,
            INSTANCES,
            ["annotations", 1],
            {"image_id": ...},
            f"{INSTANCES}:annotation at position 1",
            '"image_id"',
            0,
        ),
        (
            COCO,
            INSTANCES,
            ["annotations", 0],
            {"segmentation": ...},
            "coco/train2017/",
            '"segmentation"',
            1,
        ),
        (
            COCO,
            INSTANCES,
            ["annotations", 1],
            {"category_id": 99},
            "coco/train2017/",
            "unknown image or category",
            1,
        ),
        (
            COCO,
            INSTANCES,
            ["annotations", 1],
            {"image_id": 99},
            f"{INSTANCES}:annotation ",
            "unknown image or category",
            0,
        ),
        (
            COCO,
            INSTANCES,
            ["images", 0],
            {"height": "x"},
            "coco/train2017/",
            '"images" entry 0: "height"',
            1,
        ),
        (
            COCO,
            INSTANCES,
            ["images", 0],
            {"file_name": 3},
            f"{INSTANCES}:image at position 0",
            '"file_name"',
            1,
        ),
        (
            "paco_lvis|train",
            PACO,
            ["annotations", 0],
            {"iscrowd": 2},
            "coco/train2017/000000000009.jpg",
            '"iscrowd"',
            1,
        ),
        (
            "grefcoco|unc|train",
            REFERRED,
            ["annotations", 5],
            {"segmentation": ...},
            "refer_seg/images/",
            '"segmentation"',
            0,
        ),
        (
            "grefcoco|unc|train",
            REFERENCES,
            [0],
            {"image_id": "9"},
            f"{REFERENCES}:reference 0",
            "reference 0: ",
            0,
        ),
        (
            "LLM-Seg40K|train",
            QUESTIONS,
            None,
            {"qa_pairs": 3},
            f"{QUESTIONS}:",
            '"qa_pairs" must be a list',
            1,
        ),
        (
            "LLM-Seg40K|train",
            QUESTIONS,
            None,
            {"from_dataset": "x"},
            f"{QUESTIONS}:",
            '"from_dataset" must be one of',
            1,
        ),
        (
            "ReasonSeg|train",
            EXPLAINED,
            [0],
            {"outputs": ...},
            f"{EXPLAINED}:entry 0",
            "entry 0 needs the texts",
            0,
        ),
    ],
)
def test_a_malformed_entry_is_an_error_or_left_out_and_listed(
    everything, tmp_path, spec, file, place, fields, item, reason, lost
):
    root = tmp_path / "data"
    shutil.copytree(everything, root)
    first = next(iter(json.loads((root / file).read_text()))) if place is None else None
    before = len(open_training_set(root, spec, Faults(root)))
    spoil(root / file, *(place or [first]), **fields)
    with pytest.raises(DataError, match=re.escape(str(root / file))) as error:
        open_training_set(root, spec, Faults(root))
    assert re.search(reason, str(error.value)) and "\n" not in str(error.value)

    tolerant = Faults(root, tolerant=True, report=tmp_path / "skipped.jsonl")
    for _ in range(2):  # built, and from the store
        left = open_training_set(root, spec, tolerant)
    (bad,) = read_skip_list(tmp_path / "skipped.jsonl")
    assert (
        bad.item.startswith(item)
        and re.search(reason, bad.reason)
        and str(root / file) in bad.reason
    )
    assert len(left) == before - lost
    for index in range(len(left)):
        assert left.sample(index, np.random.default_rng(index)).conversations
    # what another run has built is no excuse
    with pytest.raises(DataError, match=re.escape(str(root / file))):
        open_training_set(root, spec, Faults(root))

    listed = Faults(root, skip=[bad])
    assert len(open_training_set(root, spec, listed)) == len(left) and listed.left_out == {spec: 1}


def open_training_set(root: Path, spec: str, faults: Faults):
    return open_evaluation(root, spec, LoaderOptions(LEVELS, explanatory=0.5, faults=faults))


def test_training_leaves_a_malformed_record_out_where_it_may(tmp_path, capsys):
    root = write_data(tmp_path / "data")
    official.write_llava(root)
    for entry in json.loads((root / RECORDS).read_text()):
        write_image(root / "coco" / "train2017" / entry["image"])
    spoil(root / RECORDS, 1, conversations=...)
    changes = {
        "dataset": "vqa||reason_seg",
        "sample_rates": "1,1",
        "epochs": 1,
        "steps_per_epoch": 2,
    }
    assert train(root, "malformed", **changes)[0] == 2
    assert re.search(
        f"error: {re.escape(str(root / RECORDS))}: {BAD_RECORD}\n", capsys.readouterr().err
    )
    code, run = train(root, "malformed", on_bad_sample="skip", **changes)
    assert code == 0 and steps(run) == 2 and "1 bad item" in capsys.readouterr().out
    assert [bad.item for bad in read_skip_list(run / "skipped.jsonl")] == [f"{RECORDS}:record 1"]
    assert (
        check.main(
            ["--dataset_dir", str(root), "--only", "vqa", "--fix-list", str(tmp_path / "bad.jsonl")]
        )
        == 1
    )
    assert [bad.item for bad in read_skip_list(tmp_path / "bad.jsonl")] == [f"{RECORDS}:record 1"]
    assert train(root, "malformed-listed", skip_list=tmp_path / "bad.jsonl", **changes)[0] == 0


def test_every_family_leaves_a_listed_image_out(everything):
    """Exactly the image that is listed: all others stay."""
    tried = set()
    for entry in OFFICIAL:
        for split in entry.splits:
            if not entry.is_there(everything, split) or entry.missing(everything, split):
                continue
            try:
                whole = entry.open(everything, split, EVAL)
            except MissingDataError:
                continue  # one file holds several splits, and not this one
            paths = [whole.path(i) for i in range(len(whole))]
            assert [str(path) for path in paths] == [
                whole.sample(i, np.random.default_rng(0)).image_path for i in range(len(whole))
            ]
            item = BadItem(f"{entry.name}|{split}", paths[0].relative_to(everything).as_posix(), "")
            options = LoaderOptions(LEVELS, training=False, faults=Faults(everything, skip=[item]))
            if len(paths) == 1:
                with pytest.raises(DataError, match="leaves nothing|can be used|empty"):
                    entry.open(everything, split, options)
            else:
                rest = entry.open(everything, split, options)
                assert [rest.path(i) for i in range(len(rest))] == paths[1:]
            tried.add(entry.family)
    assert tried >= {"sem_seg", "refer_seg", "coco", "reason_seg"}


def test_processes_share_a_report(tmp_path):
    report = tmp_path / "run" / "skipped.jsonl"
    first, second = (Faults(tmp_path, tolerant=True, report=report) for _ in range(2))
    for faults in (first, second, first):
        for name in ("a.jpg", "b.jpg"):
            faults.note("x|train", tmp_path / name, DataError("broken"))
    second.note("x|train", tmp_path / "c.jpg", DataError("two\nlines"))
    Faults(tmp_path, tolerant=True, report=report).note(
        "x|train", tmp_path / "c.jpg", DataError("again, after a restart")
    )
    assert [(item.item, item.reason) for item in read_skip_list(report)] == [
        ("a.jpg", "broken"),
        ("b.jpg", "broken"),
        ("c.jpg", "two lines"),
    ]
    write_skip_list(read_skip_list(report), tmp_path / "copy")
    assert read_skip_list(tmp_path / "copy") == read_skip_list(report)


# --------------------------------------------------------------------------------- names that leave

COCO_LIKE = {
    "coco|train2017": "coco/annotations/instances_train2017.json",
    "paco_lvis|train": "vlpart/paco/annotations/paco_lvis_v1_train.json",
    "pascal_part|train": "vlpart/pascal_part/train.json",
    "partimagenet|train": "vlpart/partimagenet/train.json",
    "refcoco|unc|train": "refer_seg/refcoco/instances.json",
    "refclef|unc|train": "refer_seg/refclef/instances.json",
    "grefcoco|unc|train": "refer_seg/grefcoco/instances.json",
    "LLM-Seg40K|train": "reason_seg/LLM-Seg40K/train.json",
}


def open_all(root: Path, spec: str) -> None:
    loader = open_evaluation(root, spec, EVAL)
    for index in range(len(loader)):
        loader.sample(index, np.random.default_rng(0))


def rename_all(path: Path, name: str) -> None:
    content = json.loads(path.read_text())
    if "images" in content:  # Two images with one file would be refused for that.
        for number, image in enumerate(content["images"]):
            image["file_name"] = f"link{number}.jpg" if name == "link.jpg" else name
    else:
        content = {
            name: next(e for e in content.values() if e["from_dataset"] == "coco" and e["qa_pairs"])
        }
    write_json(path, content)


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "sub/../../secret.jpg", "/etc/secret.jpg", "link.jpg"]
)
def test_no_name_in_an_annotation_file_leaves_the_folder(tmp_path, name):
    official.write_everything(tmp_path / "data")
    secret = write_image(tmp_path / "secret.jpg")
    for spec, file in COCO_LIKE.items():
        loader = open_evaluation(tmp_path / "data", spec, EVAL)
        photos = loader.photos["coco"] if spec.startswith("LLM") else loader.photos
        for name_of_link in ("link.jpg", *(f"link{number}.jpg" for number in range(99))):
            link = photos.places[0] / name_of_link
            if not link.is_symlink():
                link.symlink_to(secret)
        rename_all(tmp_path / "data" / file, name)
        with pytest.raises(DataError, match="refused|is a link that leaves"):
            open_all(tmp_path / "data", spec)


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ("ade20k|training", "ade20k/images/training"),
        ("ade20k|training", "ade20k/annotations/training"),
        ("mapillary|training", "mapillary/training/images"),
        ("cocostuff|train2017", "cocostuff/train2017"),
        ("ReasonSeg|train", "reason_seg/ReasonSeg/train"),
    ],
)
def test_no_link_in_a_folder_leaves_it(tmp_path, spec, place):
    official.write_everything(tmp_path / "data")
    victim = next(
        path
        for path in sorted((tmp_path / "data" / place).iterdir())
        if path.suffix in (".jpg", ".png")
    )
    victim.rename(tmp_path / victim.name)
    victim.symlink_to(tmp_path / victim.name)
    with pytest.raises(DataError, match="is a link that leaves"):
        open_evaluation(tmp_path / "data", spec, EVAL)


@pytest.mark.parametrize(
    "spec",
    [
        "own:../x|all",
        "own:/etc|all",
        "coco|x/../../../y",
        "ReasonSeg|../x",
        "../x|train",
        "LLM-Seg40K|../x",
    ],
)
def test_no_name_on_the_command_line_leaves_the_folder(everything, spec):
    (everything / "own").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="refused"):
        open_evaluation(everything, spec, EVAL)


# --------------------------------------------------------------------------------------------- docs


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the code in docs/data.md that can be run; the environment is that of the
    tests."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    text = re.sub(r"^source \.venv/bin/activate.*\n", "", text, flags=re.MULTILINE)
    return re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)


def run_block(language: str, text: str, folder: Path) -> str:
    """Runs it as a user would, with this Python, in a folder where data/ and runs/ are its own."""
    for name in ("cores", "dataset", "model", "utils", "configs", "assets", "train_ds.py"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    command = (
        [sys.executable, "-c", text]
        if language == "python"
        else ["bash", "-ec", text.replace("python", sys.executable, 1)]
    )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_makes_data_that_pass_the_check(tmp_path):
    make, look, *_ = blocks()
    run_block(*make, tmp_path)
    shown = run_block(*look, tmp_path)
    assert re.search(
        r"own:table\|train +6 images, 6 opened: 24 queries, 30 targets \(6 empty\)", shown
    )
    assert re.search(r"own:coco\|val +2 images, 2 opened: 4 queries, 4 targets", shown)
    assert re.search(r"own:labelme\|val +2 images, 2 opened: 4 queries, 4 targets", shown)
    assert len(list((tmp_path / "runs" / "check").glob("*.png"))) == 6


@pytest.mark.slow
def test_the_example_trains_and_evaluates(tmp_path):
    for language, text in blocks():
        run_block(language, text, tmp_path)
    metrics = {
        name: json.loads((tmp_path / "runs" / name / "metrics.json").read_text())
        for name in ("own", "own-coco")
    }
    assert {name: found["dataset"] for name, found in metrics.items()} == {
        "own": "own:table|val",
        "own-coco": "own:coco|val",
    }
    assert metrics["own"]["free"]["n"] == 10 and metrics["own-coco"]["free"]["n"] == 4
