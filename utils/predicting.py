"""Asks a model about many pictures, and keeps the answers in files that other programs read.

    python -m utils.predict --version runs/demo/model --images photos/ \\
        --prompts "the part that lets the dog smell" --out answers/

--images is a folder, with its subfolders, or a table (.jsonl, .csv) with a row for each question:
"image", a path from the table's folder, and "question". --prompts is a question, or a file (.txt)
with one in each line, for every picture.

::

    OUT/answers.jsonl     a line for each question: text, masks as run lengths, their files, numbers
    OUT/masks/            PNG, 0 or 255, of the picture's size: <picture>.<question>.<mask>.png
    OUT/overlays/         the masks over the pictures, with --overlay
    OUT/coco.json         a COCO data set: a category for each question
    OUT/predictions.json  what `score` and `compare --html` read

The same command continues where it was stopped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from cores.dataset import command
from cores.dataset.files.errors import DataError
from cores.dataset.files.images import read_image
from cores.dataset.files.lookup import Identities
from cores.dataset.files.paths import is_leftover, resolve_inside
from cores.dataset.files.text import read_json, read_text
from cores.dataset.files.write import prepare_output, write_text, writing
from cores.model.inference.inputs import clean_question, load_image
from cores.model.inference.results import Result
from cores.utils.asking import LESS_MEMORY, load_segmenter
from cores.utils.settings.flags import UsageError
from cores.utils.settings.programs import read_predict

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TABLES = (".jsonl", ".csv")
ASKED = ("question", "query", "prompt", "text")  # names of the column with the question
ANSWERS, SETTINGS = "answers.jsonl", "settings.json"


class AskedPicture(NamedTuple):
    """A picture and what is asked about it."""

    name: str
    """The path below the folder, with "/"."""
    path: Path
    questions: list[str]


def asked_pictures(images: Path, prompts: str | None) -> list[AskedPicture]:
    """What the flags name, in the order of the folder or of the table. Raises UsageError or
    DataError, naming file and line."""
    if images.suffix.lower() in TABLES and images.is_file():
        if prompts is not None:
            raise UsageError(f"--prompts: {images} has the questions; leave the flag out")
        return _of_table(images)
    if not images.is_dir():
        raise UsageError(f"--images {images}: is neither a folder nor a table (.jsonl, .csv)")
    if prompts is None:
        raise UsageError("--prompts is missing: give a question, or a file (.txt) with questions")
    questions = _questions(prompts)
    found = sorted(
        path
        for path in images.rglob("*")
        if path.suffix.lower() in PICTURES and not is_leftover(path.name) and path.is_file()
    )
    if not found:
        raise UsageError(f"--images {images}: holds no picture ({', '.join(PICTURES)})")
    return [AskedPicture(path.relative_to(images).as_posix(), path, questions) for path in found]


def _questions(prompts: str) -> list[str]:
    file = Path(prompts)
    if file.suffix.lower() != ".txt":
        return [clean_question(prompts)]
    if not file.is_file():
        raise UsageError(f"--prompts {file}: no such file")
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--prompts {file}: holds no question")
    return list(dict.fromkeys(clean_question(line) for line in lines))


def _of_table(table: Path) -> list[AskedPicture]:
    found: dict[str, list[str]] = {}
    for number, row in _rows(table):
        column = next((name for name in ASKED if name in row), None)
        if "image" not in row or column is None:
            keys = ", ".join(map(str, row)) or "none"
            raise DataError(f'{table}:{number}: needs "image" and "question"; it has {keys}')
        name, question = row["image"], row[column]
        if not isinstance(name, str) or not isinstance(question, str) or not question.strip():
            raise DataError(f'{table}:{number}: "image" and "{column}" must be texts')
        questions = found.setdefault(name, [])
        if (asked := clean_question(question)) not in questions:
            questions.append(asked)
    if not found:
        raise DataError(f"{table}: has no rows")
    return [
        AskedPicture(name, resolve_inside(table.parent, name), questions)
        for name, questions in found.items()
    ]


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = read_text(table)
    if table.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{table}:{number}: is not a JSON object")
            yield number, row


class Answers:
    """The folder of answers."""

    def __init__(self, folder: Path, settings: dict[str, Any], overlay: bool):
        """``settings``: what answers depend on. Raises UsageError where the folder has answers of
        others."""
        self.folder, self.overlay = folder, overlay
        prepare_output("--out", folder, is_folder=True)
        file = folder / SETTINGS
        if file.is_file():
            earlier = read_json(file)
            changed = [name for name, value in settings.items() if earlier.get(name) != value]
            if changed:
                raise UsageError(
                    f"--out {folder}: holds answers with another {', '.join(changed)}; give another"
                    " folder or the earlier flags"
                )
        elif any(folder.iterdir()):
            raise UsageError(f"--out {folder}: holds other files; give a new or empty folder")
        write_text(file, json.dumps(settings, indent=1) + "\n")
        self.rows = self._read()
        self._done = {(row["image"], row["question"]) for row in self.rows}

    def _read(self) -> list[dict[str, Any]]:
        """The complete lines; what a kill left of the last one is removed."""
        file = self.folder / ANSWERS
        if not file.is_file():
            return []
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_text(file, whole.decode("utf-8"))
        try:
            return [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        except ValueError:
            raise DataError(f"{file}: has a damaged line; remove it and go on") from None

    def missing(self, asked: AskedPicture) -> list[str]:
        return [text for text in asked.questions if (asked.name, text) not in self._done]

    def add(self, asked: AskedPicture, result: Result) -> None:
        """Writes the masks, then the line that says they are there."""
        number = asked.questions.index(result.question)
        files = []
        for index, found in enumerate(result.masks):
            name = f"{asked.name}.{number}.{index}.png"
            self._write(Path("masks") / name, 255 * found.mask.astype(np.uint8))
            files.append(f"masks/{name}")
        if self.overlay and result.masks:
            self._write(Path("overlays") / f"{asked.name}.{number}.png", result.overlay())
        row = result.to_dict() | {"image": asked.name, "number": number}
        row["size"] = list(result.image.shape[:2])
        for mask, file in zip(row["masks"], files, strict=True):
            mask["file"] = file
        with (self.folder / ANSWERS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows.append(row)
        self._done.add((asked.name, result.question))

    def _write(self, name: Path, pixels: np.ndarray) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as partial:
            Image.fromarray(pixels).save(partial, "PNG")

    def finish(self) -> None:
        """Writes coco.json and predictions.json."""
        rows = sorted(self.rows, key=lambda row: (row["image"], row["number"]))
        images = {name: i for i, name in enumerate(dict.fromkeys(r["image"] for r in rows), 1)}
        asked = {text: i for i, text in enumerate(dict.fromkeys(r["question"] for r in rows), 1)}
        sizes = {row["image"]: row["size"] for row in rows}
        coco: dict[str, Any] = {
            "images": [
                {"id": i, "file_name": name, "height": sizes[name][0], "width": sizes[name][1]}
                for name, i in images.items()
            ],
            "categories": [{"id": i, "name": text} for text, i in asked.items()],
            "annotations": [],
        }
        predictions, ids = [], Identities(images)
        for row in rows:
            for target, mask in enumerate(row["masks"]):
                x0, y0, x1, y1 = mask["box"] or (0, 0, 0, 0)
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1,
                        "image_id": images[row["image"]],
                        "category_id": asked[row["question"]],
                        "segmentation": mask["rle"],
                        "area": mask["area"],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "iscrowd": 0,
                        "score": mask["predicted_iou"],
                        "answer": row["text"],
                    }
                )
                entry = {"image_id": ids.of(row["image"]), "target": target}
                entry |= {"conversation": row["number"]}
                entry |= {"answer": row["text"], "segmentation": mask["rle"]}
                predictions.append(entry)
        write_text(self.folder / "coco.json", json.dumps(coco, ensure_ascii=False) + "\n")
        write_text(self.folder / "predictions.json", json.dumps(predictions) + "\n")


def settings_of(args: Namespace) -> dict[str, Any]:
    """What answers depend on. A model is known by the sizes and times of its files."""
    model = Path(args.version)
    files = sorted(model.glob("*")) if model.is_dir() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    names = ("precision", "load_in_8bit", "load_in_4bit", "conv_type", "max_new_tokens")
    return {"version": str(args.version)} | {
        "model": hashlib.sha256(repr(facts).encode()).hexdigest()[:16],
        **{name: getattr(args, name) for name in names},
    }


def predict(args: Namespace) -> int:
    """The exit code: 1 if a picture could not be read."""
    asked = asked_pictures(args.images, args.prompts)
    answers = Answers(args.out, settings_of(args), args.overlay)
    todo = [(one, missing) for one in asked if (missing := answers.missing(one))]
    bad: list[str] = []
    if todo:
        transformers_logging.disable_progress_bar()
        segmenter = load_segmenter(args)
        bar = {"total": len(asked), "initial": len(asked) - len(todo), "unit": "image"}
        with tqdm(**bar, disable=None) as shown:
            for start in range(0, len(todo), args.batch_size):
                some: list[tuple[AskedPicture, list[str], np.ndarray]] = []
                for one, questions in todo[start : start + args.batch_size]:
                    try:
                        some.append((one, questions, load_image(read_image(one.path))[0]))
                    except (DataError, ValueError) as error:
                        bad.append(command.one_line(error))
                pixels, texts = [p for _, _, p in some], [q for _, q, _ in some]
                found = segmenter(pixels, texts, args.batch_size) if some else []
                for (one, _, _), results in zip(some, found, strict=True):
                    for result in results:
                        answers.add(one, result)
                shown.update(min(args.batch_size, len(todo) - start))
    answers.finish()
    masks = sum(len(row["masks"]) for row in answers.rows)
    print(f"{args.out}: {len(answers.rows)} answers with {masks} masks")
    for reason in bad:
        print(f"left out: {reason}", file=sys.stderr)
    return int(bool(bad))


@command.entry(stopped="stopped; the same command continues", memory=LESS_MEMORY)
def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 if pictures were left out; 2 for a mistake in flags or files."""
    return predict(read_predict(argv))
