"""Visual question answering in LLaVA-Instruct's format: text-only answers, so that the model does
not forget how to converse.

::

    <dataset_dir>/llava_dataset/<name>.json   a list of {id, image, conversations}
    <dataset_dir>/coco/train2017/*.jpg        its images, or below <dataset_dir> where they are
                                              called "coco/train2017/….jpg", "vg/VG_100K/….jpg"

``conversations`` alternates between {"from": "human", "value": text} and {"from": "gpt", "value":
text}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cores.dataset.conversation.turns import Conversation, Turn
from cores.dataset.files.errors import DataError
from cores.dataset.files.images import read_image
from cores.dataset.files.index import RecordIndex
from cores.dataset.files.lookup import Lookup
from cores.dataset.files.paths import named_inside, require_folder
from cores.dataset.readers.usable import usable_positions
from cores.dataset.sample import LoaderOptions, Sample

IMAGE_PLACEHOLDER = "<image>"


def prepare(source: Path, entry: Any, index: int) -> tuple[str, dict] | None:
    """(image name, record) of one entry of the file, None for one about no image; its turns are
    checked here. Raises DataError."""
    where = f"{source}: record {index}"
    if isinstance(entry, dict) and entry.get("image") is None and entry.get("conversations"):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise DataError(f'{where} has no text "image"')
    messages = entry.get("conversations")
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise DataError(f'{where}: "conversations" must be pairs of a human and a gpt message')
    turns = []
    for number, message in enumerate(messages):
        speaker = "gpt" if number % 2 else "human"
        is_theirs = isinstance(message, dict) and message.get("from") == speaker
        text = message.get("value") if is_theirs else None
        if not isinstance(text, str) or not text.replace(IMAGE_PLACEHOLDER, "").strip():
            raise DataError(
                f'{where}: message {number} must be {{"from": "{speaker}", "value": text}}'
            )
        # The template puts the image before the first question; anywhere else, "<image>" is a word.
        turns.append((text.replace(IMAGE_PLACEHOLDER, "") if number == 0 else text).strip())
    image = entry["image"]
    return image, {"id": str(entry.get("id", index)), "image": image, "turns": turns}


class VisualQuestionAnswering:
    """A sample is an image with one conversation of several turns and no mask."""

    def __init__(self, dataset_dir: str | Path, name: str, options: LoaderOptions):
        """``name``: the JSON's name without ending, "llava_instruct_150k". Raises DataError."""
        self.dataset = f"vqa|{name}"
        root = require_folder(Path(dataset_dir) / "llava_dataset", "the LLaVA-Instruct JSON")
        self.source = named_inside(root, f"{name}.json")
        self.index = RecordIndex.open(
            self.source, "vqa-3", prepare, tolerant=options.faults.leaves_out
        )
        if not len(self.index):
            raise DataError(f"{self.source}: no record has an image, which every sample needs")
        if self.index.passed_over:
            options.faults.remark(
                self.dataset,
                f"{self.index.passed_over} of {self.index.passed_over + len(self.index)} records"
                " have no image; these conversations in text alone are left out",
            )
        # LLaVA's mixture names its photos by their folders: coco/train2017/…, vg/VG_100K/….
        folder = Path(dataset_dir) / "coco" / "train2017"
        if not folder.is_dir() and not any("/" in name for name in self.index.names):
            require_folder(folder, f"the images of {self.source.name}")
        self.photos = Lookup([folder, Path(dataset_dir), root], options.follow_links)
        name_of = self.index.names.__getitem__
        self.positions = usable_positions(
            self.index, range(len(self.index)), name_of, self.photos, options, self.dataset
        )

    def __len__(self) -> int:
        return len(self.positions)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.photos.item(self.index.names[int(self.positions[index])])

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Record ``index``; nothing in it is random."""
        record = self.index[int(self.positions[index])]
        path = self.photos.find(record["image"])
        image = read_image(path)
        texts = record["turns"]
        turns: list[Turn] = [(q, [a]) for q, a in zip(texts[::2], texts[1::2], strict=True)]
        conversation = Conversation(turns, np.zeros((0, *image.shape[:2]), dtype=bool))
        return Sample(image, str(path), [conversation], "vqa", self.dataset, record["id"])
