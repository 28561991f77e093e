"""Visual question answering in LLaVA-Instruct's format: text-only answers, so that the model does
not forget how to converse.

::

    <dataset_dir>/llava_dataset/<name>.json   a list of {id, image, conversations}
    <dataset_dir>/coco/train2017/*.jpg        its images

``conversations`` alternates between {"from": "human", "value": text} and {"from": "gpt", "value":
text}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dataset.conversation.turns import Conversation, Turn
from dataset.files.errors import DataError
from dataset.files.images import read_image
from dataset.files.index import RecordIndex
from dataset.files.paths import named_inside, require_folder, resolve_inside
from dataset.readers.usable import usable_positions
from dataset.sample import LoaderOptions, Sample

IMAGE_PLACEHOLDER = "<image>"


def prepare(source: Path, entry: Any, index: int) -> tuple[str, dict]:
    """(image name, record) of one entry of the file; its turns are checked here. Raises
    DataError."""
    where = f"{source}: record {index}"
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
            self.source, "vqa-2", prepare, tolerant=options.faults.leaves_out
        )
        self.folder = require_folder(
            Path(dataset_dir) / "coco" / "train2017", f"the images of {self.source.name}"
        )
        name_of = self.index.names.__getitem__
        self.positions = usable_positions(
            self.index, range(len(self.index)), name_of, self.folder, options, self.dataset
        )

    def __len__(self) -> int:
        return len(self.positions)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.folder / self.index.names[int(self.positions[index])]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Record ``index``; nothing in it is random."""
        record = self.index[int(self.positions[index])]
        path = resolve_inside(self.folder, record["image"])
        image = read_image(path)
        texts = record["turns"]
        turns: list[Turn] = [(q, [a]) for q, a in zip(texts[::2], texts[1::2], strict=True)]
        conversation = Conversation(turns, np.zeros((0, *image.shape[:2]), dtype=bool))
        return Sample(image, str(path), [conversation], "vqa", self.dataset, record["id"])
