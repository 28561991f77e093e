"""Visual question answering in LLaVA-Instruct's format: text-only targets that keep the model able
to talk.

::

    <dataset_dir>/llava_dataset/<name>.json   a list of {id, image, conversations}; these alternate between
                                              {"from": "human", "value": text} and {"from": "gpt", "value": text}
    <dataset_dir>/coco/train2017/*.jpg        its images
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
from dataset.readers.coco import usable
from dataset.sample import LoaderOptions, Sample

IMAGE_PLACEHOLDER = "<image>"


def prepare(source: Path, entry: Any, index: int) -> tuple[str, dict]:
    """(image name, record) of one entry of the file; its turns are checked here. Raises
    DataError."""
    where = f"{source}: record {index}"
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise DataError(f'{where} has no text "image"')
    spoken = entry.get("conversations")
    if not isinstance(spoken, list) or not spoken or len(spoken) % 2:
        raise DataError(f'{where}: "conversations" must be pairs of a human and a gpt message')
    turns = []
    for number, message in enumerate(spoken):
        speaker = "gpt" if number % 2 else "human"
        text = (
            message.get("value")
            if isinstance(message, dict) and message.get("from") == speaker
            else None
        )
        if not isinstance(text, str) or not text.replace(IMAGE_PLACEHOLDER, "").strip():
            raise DataError(
                f'{where}: message {number} must be {{"from": "{speaker}", "value": text}}'
            )
        # the place of the image is the template's matter; elsewhere the word is left alone
        turns.append((text.replace(IMAGE_PLACEHOLDER, "") if number == 0 else text).strip())
    return entry["image"], {
        "id": str(entry.get("id", index)),
        "image": entry["image"],
        "turns": turns,
    }


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
        positions, names = range(len(self.index)), list(self.index.names)
        self.positions = usable(self.index, positions, names, self.folder, options, self.dataset)

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
