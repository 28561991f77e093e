"""What training reads: the same samples for any number of workers, none twice among ranks, one
image for its conversations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cores.dataset.collate import collate
from cores.dataset.mixture import TrainMixture
from cores.dataset.readers import coco
from cores.utils import distributed
from cores.utils.settings.arguments import parse
from cores.utils.training.loader import RankSampler, make_loader
from tests.dataset_toys import LEVELS, ToyProcessor, write_image, write_json, write_reason_seg


@pytest.fixture
def data(tmp_path):
    """Six images with two queries each, and one with instances of three categories."""
    write_reason_seg(tmp_path, count=6)
    write_image(tmp_path / "coco" / "train2017" / "a.jpg")
    instances = [
        {
            "id": i,
            "image_id": 1,
            "category_id": i,
            "segmentation": [[i, i, i + 5, i, i + 5, i + 5, i, i + 5]],
            "iscrowd": 0,
        }
        for i in (1, 2, 3)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 12}],
        "annotations": instances,
    }
    content["categories"] = [{"id": i, "name": f"thing {i}"} for i in (1, 2, 3)]
    write_json(tmp_path / "coco" / "annotations" / "instances_train2017.json", content)
    return tmp_path


def batches(
    data,
    monkeypatch,
    workers: int,
    rank: int = 0,
    world: int = 1,
    batch: int = 2,
    epoch: int = 0,
    samples: int = 12,
):
    """What one rank reads in an epoch, by the loader that training uses."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    processor = ToyProcessor()
    processor.levels, processor.template = list(LEVELS), "tiny"
    mixture = TrainMixture(data, "reason_seg||coco", [2, 1], LEVELS, samples, seed=5)
    mixture.set_epoch(epoch)
    loader, _ = make_loader(
        mixture, processor, parse(["--batch_size", str(batch), "--workers", str(workers)])
    )
    return list(loader)


def facts(batch) -> list[tuple]:
    """One per conversation, without the padding."""
    tokens = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    masks = [mask.numpy().tobytes() for mask in batch.target_masks]
    pixels = batch.clip_pixels[batch.image_index].mean((1, 2, 3)).tolist()
    names = [(info["image_path"], info["conversation"]) for info in batch.info]
    return list(zip(names, tokens, masks, pixels, strict=True))


def test_any_number_of_workers_reads_the_same(data, monkeypatch):
    expected = {e: [facts(b) for b in batches(data, monkeypatch, 0, epoch=e)] for e in (0, 1)}
    assert len(expected[0]) == 6 and expected[0] != expected[1]
    for workers in (1, 3):
        assert [facts(b) for b in batches(data, monkeypatch, workers, epoch=1)] == expected[1]
    # a rank of several, too
    alone = [facts(b) for b in batches(data, monkeypatch, 0, rank=1, world=3)]
    assert [facts(b) for b in batches(data, monkeypatch, 3, rank=1, world=3)] == alone


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_samples_of_one(data, monkeypatch, world):
    """With the same total batch every step trains on the same samples, whatever the number of
    ranks."""
    alone = [facts(b) for b in batches(data, monkeypatch, 0, batch=2 * world)]
    ranks = [
        [facts(b) for b in batches(data, monkeypatch, 0, rank, world)] for rank in range(world)
    ]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone


@given(
    steps=st.integers(0, 5),
    batch=st.integers(1, 4),
    world=st.integers(1, 5),
    rest=st.integers(0, 3),
    done=st.integers(0, 5),
)
def test_ranks_are_disjoint_and_leave_nothing_out(steps, batch, world, rest, done):
    total = steps * batch * world + min(rest, batch * world - 1)
    ranks = []
    for rank in range(world):
        sampler = RankSampler(total, batch, rank, world)
        sampler.first_micro_step = min(done, steps)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    every = np.array(ranks, dtype=int).reshape(world, -1, batch).transpose(1, 0, 2).ravel().tolist()
    assert every == list(range(min(done, steps) * batch * world, steps * batch * world))


def test_conversations_of_an_image_share_it(data, monkeypatch):
    read = []
    monkeypatch.setattr(
        coco,
        "read_claimed",
        lambda path, *entry, real=coco.read_claimed: read.append(path) or real(path, *entry),
    )
    mixture = TrainMixture(data, "coco", [1], LEVELS, 2)
    samples = [mixture[0], mixture[1]]
    assert [len(sample.conversations) for sample in samples] == [3, 3] and len(read) == 2
    processor = ToyProcessor()
    batch = collate(samples, processor, LEVELS, "tiny")
    assert processor.clip_calls == processor.sam_calls == 2
    assert (
        batch.image_index.tolist() == [0, 0, 0, 1, 1, 1]
        and len(batch.clip_pixels) == len(batch.sam_pixels) == 2
    )
    assert len({info["query"] for info in batch.info[:3]}) == 3
