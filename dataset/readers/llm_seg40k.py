"""LLM-Seg40K: questions that GPT-4 wrote about photos of COCO (by way of LVIS) and of EgoObjects.

::

    <dataset_dir>/reason_seg/LLM-Seg40K/{train,validation,test}.json
    <dataset_dir>/coco/train2017/*.jpg          photos with "from_dataset": "coco"
    <dataset_dir>/ego_objects/images/*          photos with "from_dataset": "ego_objects"

The layout was taken from the reader in the data set's own repository (wangjunchi/LLMSeg,
utils/llm_seg_dataset.py), since the files themselves were not at hand: a JSON maps an image's name
to ``{"from_dataset": …, "qa_pairs": [{"question", "answer", "rle_seg"}, …]}``, where ``rle_seg`` is
COCO's compressed run lengths of the target. Every question is a sentence. Neither that reader nor
this one uses the answer in words. A question may also be a list of wordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from cores.dataset.conversation.turns import Conversation
from cores.dataset.conversation.wordings import answer, sentence_question
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.images import read_image
from cores.dataset.files.lookup import Identities, Lookup
from cores.dataset.files.packed import PackedRecords
from cores.dataset.files.paths import named_inside, require_folder
from cores.dataset.files.rle import decode_rle, rle_size
from cores.dataset.files.text import read_json
from cores.dataset.readers.questions import as_wordings, choose_wordings
from cores.dataset.readers.usable import without_excluded, without_missing
from cores.dataset.sample import LoaderOptions, Sample

NAME = "LLM-Seg40K"
SPLITS = {"val": "validation"}  # split on the command line -> name of its file, where they differ
FOLDERS = {"coco": "coco/train2017", "ego_objects": "ego_objects/images"}


def _read_entry(path: Path, name: str, entry: Any) -> list:
    """[image name, a key of FOLDERS, [[wordings, run lengths], …]] of one entry. Raises
    DataError."""
    where = f"{path}: {name!r}"
    if not isinstance(entry, dict) or entry.get("from_dataset") not in FOLDERS:
        raise DataError(f'{where}: "from_dataset" must be one of {", ".join(FOLDERS)}')
    pairs = entry.get("qa_pairs")
    if not isinstance(pairs, list) or any(not isinstance(pair, dict) for pair in pairs):
        raise DataError(f'{where}: "qa_pairs" must be a list of questions')
    queries = []
    for number, pair in enumerate(pairs):
        texts = as_wordings(pair.get("question"))
        if not texts:
            raise DataError(
                f'{where}: question {number}: "question" must be a text, or several wordings of it'
            )
        if not isinstance(pair.get("rle_seg"), dict):
            raise DataError(
                f'{where}: question {number}: "rle_seg" must be {{"size": [height, width],'
                ' "counts": …}'
            )
        queries.append([[text.strip() for text in texts], pair["rle_seg"]])
    return [name, entry["from_dataset"], queries]


class LlmSeg40K:
    """A sample is an image with its questions."""

    def __init__(self, dataset_dir: str | Path, spec: str, options: LoaderOptions):
        """``spec``: "LLM-Seg40K|train", "|val" or "|test". Raises DataError."""
        self.dataset, self.options = spec, options
        name, _, split = spec.partition("|")
        if name != NAME or not split:
            raise ValueError(f'{spec!r} names no split; write it as "{NAME}|val"')
        root = Path(dataset_dir)
        folder = require_folder(root / "reason_seg" / NAME, f"the JSON files of {NAME}")
        self.source = named_inside(folder, f"{SPLITS.get(split, split)}.json")
        if not self.source.is_file():
            known = ", ".join(sorted(path.stem for path in folder.glob("*.json"))) or "none"
            raise MissingDataError(f"{self.source}: no such split; there are: {known}")
        self.photos = {
            kind: Lookup([root / place], options.follow_links) for kind, place in FOLDERS.items()
        }
        content = read_json(self.source)
        if not isinstance(content, dict) or not content:
            raise DataError(f"{self.source}: must map names of images to their questions")
        records: Sequence[list] = [record for record in self._checked(content) if record[2]]
        if options.training:
            # A photo of EgoObjects is never one of COCO's, whatever its name looks like.
            records = without_excluded(
                records, lambda r: r[0] if r[1] == "coco" else "", options, self.dataset
            )
        kept = self._with_image(records)
        self.records, self.identities = PackedRecords(kept), Identities(map(itemgetter(0), kept))
        if not len(self.records):
            raise DataError(f"{self.source}: holds no question")

    def _checked(self, content: dict) -> list[list]:
        found, bad = [], []
        for image, entry in sorted(content.items()):
            try:
                found.append(_read_entry(self.source, image, entry))
            except DataError as error:
                bad.append((f"{self.source}:{image}", str(error)))
        self.options.faults.leave_out(self.dataset, bad)
        return found

    def _with_image(self, records: Sequence[list]) -> list[list]:
        """The records whose photo is there, sorted by its name."""
        kept: list[list] = []
        for kind, photos in self.photos.items():
            same_kind = [record for record in records if record[1] == kind]
            if same_kind:
                require_folder(photos.places[0], f"the photos of {self.dataset} from {kind}")
                kept += without_missing(
                    same_kind, itemgetter(0), photos, self.source, self.options, self.dataset
                )
        return sorted(kept, key=itemgetter(0))

    def __len__(self) -> int:
        return len(self.records)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        name, kind, _ = self.records[index]
        return self.photos[kind].item(name)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its questions in training, all of them otherwise;
        Sample.kind is "reasoning"."""
        name, kind, queries = self.records[index]
        path = self.photos[kind].find(name)
        image = read_image(path, (rle_size(rle) for _, rle in queries))
        chosen = choose_wordings([texts for texts, _ in queries], self.options, rng)
        conversations = [
            self._conversation(name, text, queries[number][1], image.shape[:2], rng)
            for number, text in chosen
        ]
        id = self.identities.of(name)
        return Sample(image, str(path), conversations, "reasoning", self.dataset, id)

    def _conversation(
        self, name: str, text: str, rle: dict, size: tuple[int, int], rng: np.random.Generator
    ) -> Conversation:
        target = decode_rle(rle, size, self.source, f"{name} rle_seg")
        question = sentence_question(text, self.options.wording(rng))
        reply = answer(self.options.levels, self.options.wording(rng))
        return Conversation([(question, reply)], target[None], is_sentence=True)
