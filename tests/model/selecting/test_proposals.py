"""Proposals: run lengths, ranking, the store on disk, where a collator gets them from, the
generator, the ceiling."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cores.dataset.files.errors import DataError
from cores.dataset.proposals import (
    Found,
    ProposalSource,
    ProposalStore,
    encode_counts,
    overlaps,
    pooling_weights,
    runs,
    union,
)
from cores.model.config import ProposalConfig
from cores.model.segmenting.sam import build_sam
from cores.model.selecting.proposals import make_generator, proposals_fingerprint
from cores.utils.evaluation.oracle import oracle_masks
from tests.helpers import SAM_DIMS, randomise, rectangle


def masks_of(seed: int, count: int, size: tuple[int, int], share: float = 0.4) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *size)) < share


def picture(seed: int = 0, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


BOXES = np.zeros((3, 4, 6), dtype=bool)
BOXES[0, 0, :5], BOXES[1, 1:4, :3], BOXES[2, 1:3, 3:6] = True, True, True
FOUND = Found((4, 6), encode_counts(BOXES), [5, 9, 6], [0.9, 0.5, 0.7])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.booleans()
)
def test_overlaps_are_those_of_the_pixels(seed, count, height, width, ignored):
    proposals, targets = (
        masks_of(seed, count, (height, width)),
        masks_of(seed + 1, 2, (height, width)),
    )
    ignore = masks_of(seed + 2, 1, (height, width))[0] if ignored else None
    iou, iop = overlaps(runs(proposals) if count else [], targets, ignore)
    assert iou.shape == iop.shape == (2, count)
    keep = np.ones((height, width), dtype=bool) if ignore is None else ~ignore
    for t, target in enumerate(targets):
        for k, proposal in enumerate(proposals):
            both, either, own = (
                (m & keep).sum() for m in (proposal & target, proposal | target, proposal)
            )
            assert iou[t, k] == pytest.approx(both / either if either else 0, abs=1e-6)
            assert iop[t, k] == pytest.approx(both / own if own else 0, abs=1e-6)
    assert (union(runs(proposals) if count else [], (height, width)) == proposals.any(0)).all()


def test_rankings():
    assert FOUND.ranked("area", 2) == [1, 2]
    assert FOUND.ranked("quality", 2) == [0, 2]
    assert FOUND.ranked("mixed", 3) == [1, 0, 2]
    assert FOUND.ranked("mixed", 50) == [1, 0, 2]


def test_pooling_weights_are_shares_of_the_padded_frame():
    """An image of 4 rows and 8 columns stands in the upper half of its 8 × 8 frame."""
    masks = runs(np.stack([rectangle((4, 8), 0, 0, 4, 2), rectangle((4, 8), 1, 1, 2, 2)]))
    weights = pooling_weights(masks, (4, 8), 4)
    expected = torch.zeros(2, 4, 4)
    expected[0, :2, 0] = 1
    expected[1, 0, 0] = 0.25
    assert torch.equal(weights, expected)
    assert pooling_weights([], (4, 8), 4).shape == (0, 4, 4)


def test_the_store_is_addressed_by_pixels_and_settings(tmp_path):
    store, other = ProposalStore(tmp_path, "a"), ProposalStore(tmp_path, "b")
    image = picture()
    assert store.read(image) is None
    store.write(image, FOUND)
    assert store.read(image.copy()) == FOUND
    assert other.read(image) is None
    assert store.read(picture(1)) is None
    assert store.read(image.reshape(30, 20, 3)) is None  # the same bytes, another picture
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"size": [1, 2]}', '{"size": 3, "masks": [], "areas": [], "quality": []}'],
)
def test_a_broken_file_is_named(tmp_path, text):
    store = ProposalStore(tmp_path, "a")
    store.write(picture(), FOUND)
    store.path(picture()).write_text(text)
    with pytest.raises(DataError, match="delete it and compute it again") as error:
        store.read(picture())
    assert store.path(picture()).name in str(error.value)


def test_a_source_reads_before_it_computes(tmp_path):
    calls = []

    def generate(image):
        calls.append(image)
        return FOUND

    source = ProposalSource("area", 2, 4, ProposalStore(tmp_path, "a"), generate)
    first, second = source(picture(), "x"), source(picture(), "x")
    assert len(calls) == 1
    assert (
        len(first) == 2
        and first.masks == second.masks
        and torch.equal(first.weights, second.weights)
    )
    assert [mask["counts"] for mask in first.masks] == [FOUND.masks[1], FOUND.masks[2]]
    reader = ProposalSource("area", 2, 4, ProposalStore(tmp_path, "a"))
    assert reader(picture(), "x").masks == first.masks
    with pytest.raises(DataError, match=r"toy 7: no proposals, .*utils.precompute_proposals"):
        reader(picture(1), "toy 7")
    with pytest.raises(DataError, match="no store is given"):
        ProposalSource()(picture(), "x")


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    sam = build_sam(SAM_DIMS)
    randomise(sam, scale=0.3)
    return sam.eval()


LOOSE = ProposalConfig(points_per_side=3, predicted_iou=0, stability=0, nms=1, long_side=40)


def test_the_generator_finds_masks_in_the_frame_of_the_image(sam):
    image = picture(3, (30, 60))
    three, one = (
        make_generator(sam, c)(image)
        for c in (LOOSE, ProposalConfig(**(vars(LOOSE) | {"multimask": False})))
    )
    assert three.size == one.size == (20, 40)  # the longer side is limited
    assert 9 < len(three.masks) <= 27
    assert 0 < len(one.masks) <= 9
    for found in (three, one):
        assert [
            int(union([{"size": list(found.size), "counts": m}], found.size).sum())
            for m in found.masks
        ] == found.areas
    assert make_generator(sam, LOOSE)(image) == three  # nothing random
    strict = make_generator(sam, ProposalConfig(points_per_side=3, predicted_iou=1, stability=1))(
        image
    )
    assert strict.masks == [] and strict.size == (30, 60)


def test_half_precision_is_computed_in_full(sam):
    half = copy.deepcopy(sam).bfloat16()
    full = copy.deepcopy(half).float()
    assert make_generator(half, LOOSE)(picture(3)) == make_generator(full, LOOSE)(picture(3))
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_fingerprint_tells_weights_and_settings_but_not_precision(sam):
    name = proposals_fingerprint(sam, LOOSE)
    assert proposals_fingerprint(copy.deepcopy(sam).bfloat16(), LOOSE) == name
    assert proposals_fingerprint(sam, ProposalConfig()) != name
    changed = copy.deepcopy(sam)
    with torch.no_grad():
        changed.mask_decoder.iou_token.weight[0, 0] += 1
    assert proposals_fingerprint(changed, LOOSE) != name


def test_wrong_settings_are_refused():
    for field, value in (
        ("points_per_side", 0),
        ("long_side", 0),
        ("predicted_iou", 1.1),
        ("stability", -0.1),
        ("nms", 2),
    ):
        with pytest.raises(ValueError, match=f"proposals.{field}"):
            ProposalConfig(**{field: value})


def test_oracles_choose_what_helps():
    size = (10, 10)
    target = rectangle(size, 0, 0, 4, 10)  # 40 pixels
    left, right, whole = (
        rectangle(size, 0, 0, 4, 5),
        rectangle(size, 0, 5, 4, 9),
        rectangle(size, 0, 0, 10, 10),
    )
    found = oracle_masks(np.stack([left, right, whole]), target)
    assert (found["oracle_best_proposal"] == left).all()
    assert (found["oracle_iop"] == (left | right)).all()
    assert (found["oracle_union"] == (left | right)).all()
    only = oracle_masks(whole[None], target)  # IoP 0.4: the published rule takes nothing
    assert not only["oracle_iop"].any()
    assert (only["oracle_union"] == whole).all()
    ignoring = oracle_masks(whole[None], target, ignore=rectangle(size, 4, 0, 10, 10))
    assert (ignoring["oracle_iop"] == whole).all()
    assert not any(
        mask.any() for mask in oracle_masks(np.zeros((0, *size), dtype=bool), target).values()
    )
