"""Fills a cache of SAM's image embeddings (model/segmenting/embedding_cache.py) before a training
that uses it.

    python -m utils.sam_cache --config FILE --sam_cache DIR    # `torchrun -m` shares the work

The same command continues where it was stopped.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cores.dataset import command
from cores.dataset.files.errors import DataError
from cores.model.segmenting.embedding_cache import GIGABYTE, SamCache
from cores.model.segmenting.frames import preprocess
from cores.utils import build, distributed
from cores.utils.settings.programs import read_sam_cache

logger = logging.getLogger(__name__)


class LoaderImages(Dataset):
    """Every image of some loaders, as (its key in the cache, SAM's pixels float (3, S, S)). The
    pixels are None where the cache has the embedding, the item is None where the image is bad."""

    def __init__(self, loaders: list, cache: SamCache, image_size: int, skip_bad: bool):
        self.loaders, self.cache = loaders, cache
        self.image_size, self.skip_bad = image_size, skip_bad
        self.ends = np.cumsum([len(loader) for loader in loaders])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[str, Tensor | None] | None:
        which = int(np.searchsorted(self.ends, index, side="right"))
        loader = self.loaders[which]
        number = int(index - (self.ends[which] - len(loader)))
        try:
            image = loader.sample(number, np.random.default_rng(index)).image
        except DataError as error:
            if not self.skip_bad:
                raise
            logger.warning("left out: %s", error)
            return None
        key = self.cache.key(image)
        # A damaged entry must not wait for the training to find it.
        there = self.cache.load(key) is not None
        return key, None if there else preprocess(image, self.image_size)[0]


def fill(
    sam: Sam, cache: SamCache, images: LoaderImages, share: slice, workers: int, progress: bool
) -> dict[str, int]:
    """Embeds every image of ``share`` that the cache lacks. Returns counts: computed, present,
    left_out. Stops early when the cache is full."""
    device, dtype = distributed.device(), next(sam.parameters()).dtype
    encoder = sam.image_encoder.to(device).eval()
    counts = {"computed": 0, "present": 0, "left_out": 0}
    indices = range(len(images))[share]
    loader = DataLoader(images, batch_size=None, sampler=indices, num_workers=workers)
    bar = {"total": len(indices), "desc": "SAM cache", "unit": "image", "disable": not progress}
    for item in tqdm(loader, **bar):
        if item is None:
            counts["left_out"] += 1
        elif item[1] is None or cache.has(item[0]):
            counts["present"] += 1
        else:
            with torch.no_grad():
                cache.store(item[0], encoder(item[1][None].to(device, dtype))[0])
            counts["computed"] += 1
        if cache.closed:
            break
    return counts


@command.entry(stopped="stopped; the same command continues")
def main(argv: list[str] | None = None) -> int:
    """Fills a cache with the images that the flags of train_ds.py name. Exit code 0; 2 for a
    mistake; 130 when stopped."""
    here = distributed.place()  # Ranks share the work, but need not meet.
    s = read_sam_cache(argv)
    source = build.open_version(s)
    prompt = build.prompt_format(s, source)
    families = build.build_mixture(s, prompt).families
    loaders = [loader for family in families for loader in family]
    if not s.no_eval:
        loaders.append(build.build_eval(s, prompt).loader)
    sam, image_size = build.build_sam_only(s, source)
    cache = build.open_sam_cache(s, sam, image_size)
    images = LoaderImages(loaders, cache, image_size, s.on_bad_sample == "skip")
    share = slice(here.rank, None, here.world)
    counts = fill(sam, cache, images, share, s.workers, progress=here.rank == 0)
    shown = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    full = "; full, the rest is computed as it is needed" if cache.closed else ""
    size = f"{cache.used() / GIGABYTE:.2f} GB in {cache.root}"
    print(f"{cache.folder}: {shown}; {size}{full}", flush=True)
    return 0
