"""What a run reads: the mixture of data sets to train on, and the data set to evaluate on.

A training sample is a pure function of (seed, epoch, index): the numbers of workers and ranks and
restarts change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from cores.dataset.conversation import exemplars
from cores.dataset.files.errors import DataError, NothingToAsk
from cores.dataset.files.faults import Faults, read_skip_list
from cores.dataset.files.paths import require_folder
from cores.dataset.readers.referring import validation_images
from cores.dataset.registry import TRAINING, Loader, open_evaluation, open_training
from cores.dataset.sample import LoaderOptions, Sample

logger = logging.getLogger(__name__)

KNOWN = tuple(TRAINING)
MAX_REPLACEMENTS = 20  # tries before a training set is called unusable


def _names(text: str, flag: str) -> list[str]:
    names = text.split("||")
    if not all(names):
        raise ValueError(f'{flag} {text!r}: write one name, or several joined by "||"')
    return names


def build_family(
    name: str, dataset_dir: str | Path, data: dict[str, str], options: LoaderOptions
) -> list[Loader]:
    """The loaders of one name in --dataset. ``data``: family -> the names of its data sets, joined
    by "||".

    Raises ValueError, which lists the known names, or DataError for missing or broken files.
    """
    if name not in KNOWN:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(KNOWN)}")
    names = _names(data[name], f"--{name}_data")
    return [open_training(name, dataset_dir, one, options) for one in names]


def with_exemplars(sample: Sample, rng: np.random.Generator, count: int) -> Sample:
    """The sample with ``count`` exemplars drawn by ``rng``, none of which repeats a question of the
    sample."""
    questions = [question for c in sample.conversations for question, _ in c.turns]
    sample.exemplars = exemplars.draw_exemplars(rng, count, questions)
    return sample


class TrainMixture(Dataset):
    """Draws a family by its rate, then one of its data sets, then one of its images.

    ``bad_samples`` counts, in this process, the samples that had to be replaced.
    """

    def __init__(
        self,
        dataset_dir: str | Path,
        dataset: str,
        sample_rates: Sequence[float],
        levels: Sequence[str],
        samples_per_epoch: int,
        seed: int = 0,
        exemplar_count: int = 1,
        num_classes_per_sample: int = 3,
        sem_seg_data: str = "ade20k",
        refer_seg_data: str = "refclef||refcoco||refcoco+||refcocog",
        coco_data: str = "train2017",
        reason_seg_data: str = "ReasonSeg|train",
        vqa_data: str = "llava_instruct_150k",
        explanatory: float = 0.1,
        on_bad_sample: str = "raise",
        exclude_val: bool = False,
        own_data: str = "",
        skip_list: str | Path = "",
        report: str | Path | None = None,
        follow_links: bool = False,
    ):
        """``dataset``: names of families (KNOWN) joined by "||", with one rate each in
        ``sample_rates``. ``explanatory``: probability that a query with a known explanation asks
        for it. ``on_bad_sample``: "raise" stops at a file that cannot be used, "skip" logs it and
        takes another one, the same in every run. ``exclude_val``: leave out all photos of COCO that
        the val and test splits of refCOCO, refCOCO+ and refCOCOg hold. ``skip_list``: file of items
        to leave out (dataset/files/faults.py). ``report``: file to which bad items are added.
        ``follow_links``: files may be links out of the data folder.
        Raises ValueError or DataError for everything that can be checked without drawing."""
        names = _names(dataset, "--dataset")
        rates = np.array(sample_rates, dtype=float)
        sound = rates.shape == (len(names),) and bool(np.all(rates >= 0))
        if not sound or not 0 < sum(rates.tolist()) < float("inf"):
            found = list(sample_rates)
            raise ValueError(
                f"--sample_rates {found}: give {len(names)} numbers for {names}, finite, none"
                " negative, not all 0"
            )
        if samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch must be at least 1, got {samples_per_epoch}")
        if on_bad_sample not in ("raise", "skip"):
            raise ValueError(f'--on_bad_sample must be "raise" or "skip", got {on_bad_sample!r}')
        require_folder(dataset_dir, "the data")
        listed = read_skip_list(skip_list) if skip_list else []
        self.faults = Faults(dataset_dir, on_bad_sample == "skip", listed, report)
        options = LoaderOptions(
            tuple(levels),
            faults=self.faults,
            num_classes_per_sample=num_classes_per_sample,
            explanatory=explanatory,
            skip_missing=on_bad_sample == "skip",
            follow_links=follow_links,
            excluded_coco=validation_images(dataset_dir) if exclude_val else frozenset(),
        )
        data = {"sem_seg": sem_seg_data, "refer_seg": refer_seg_data, "coco": coco_data}
        data |= {"reason_seg": reason_seg_data, "vqa": vqa_data, "own": own_data}
        self.families = [build_family(name, dataset_dir, data, options) for name in names]
        if skip_list:
            counts = sorted(self.faults.left_out.items())
            shown = ", ".join(f"{count} of {name}" for name, count in counts if count)
            shown = shown or "none of them; it may be for other data"
            logger.warning("%s: has %d items, left out: %s", skip_list, len(listed), shown)
        self.rates = rates / rates.sum()
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self.exemplar_count = exemplar_count
        self.on_bad_sample = on_bad_sample
        self.bad_samples = 0
        _try_exemplars(exemplar_count)
        # The epoch is in shared memory, so that persistent workers see the new one.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that samples are a function of; call it before iterating."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = [self.seed, int(self._epoch[0]), index]
        for attempt in range(MAX_REPLACEMENTS):
            # Only repeated attempts have a longer key, so a replacement changes no other sample.
            rng = np.random.default_rng(np.random.SeedSequence(key + [attempt] * (attempt > 0)))
            try:
                return self._draw(rng)
            except NothingToAsk:
                continue  # The image is sound, so it is neither counted nor reported as bad.
            except DataError as error:
                if self.on_bad_sample == "raise":
                    raise
                self.bad_samples += 1
                logger.warning("bad sample replaced: %s", error)
        raise DataError(
            f"{MAX_REPLACEMENTS} draws in a row met unusable images (see any warnings above);"
            " repair the data set"
        )

    def _draw(self, rng: np.random.Generator) -> Sample:
        family = self.families[int(rng.choice(len(self.families), p=self.rates))]
        loader = family[int(rng.integers(len(family)))]
        index = int(rng.integers(len(loader)))
        try:
            sample = loader.sample(index, rng)
        except NothingToAsk:
            raise
        except DataError as error:
            if self.on_bad_sample == "skip":
                self.faults.note(loader.dataset, loader.path(index), error)
            raise
        return with_exemplars(sample, rng, self.exemplar_count)


def _try_exemplars(count: int) -> None:
    """Raises ValueError for an exemplar count that the library cannot serve, which would otherwise
    be raised by the first sample."""
    if count < 0:
        raise ValueError(f"--exemplar_count must not be negative, got {count}")
    exemplars.draw_exemplars(np.random.default_rng(0), count)


class EvalDataset(Dataset):
    """Every image of an evaluation set once, in the order of file names, canonically worded."""

    def __init__(
        self,
        dataset_dir: str | Path,
        name: str,
        levels: Sequence[str],
        exemplar_count: int = 1,
        seed: int = 0,
        texts: str = "first",
        follow_links: bool = False,
    ):
        """``name``: "ReasonSeg|val", "ReasonSeg|testshort", "SynthReason|val" (a folder under
        reason_seg and its split), "LLM-Seg40K|val", "refcoco|unc|testA", "coco|val2017",
        "own:parts|val", or a semantic set such as "ade20k|validation". ``texts``: "first" scores
        the first wording of a query as published, "all" every wording; the referring sets score
        every sentence in any case. Exemplars depend on (seed, index) only. Raises ValueError or
        DataError."""
        require_folder(dataset_dir, "the data")
        options = LoaderOptions(
            tuple(levels), training=False, texts=texts, follow_links=follow_links
        )
        self.loader: Loader = open_evaluation(dataset_dir, name, options)
        self.exemplar_count = exemplar_count
        self.seed = seed
        _try_exemplars(exemplar_count)

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, index]))
        return with_exemplars(self.loader.sample(index, rng), rng, self.exemplar_count)
