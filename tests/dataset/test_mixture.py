"""The training mixture is a function of (seed, epoch, index); evaluation sets are stable; errors
come early."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cores.dataset.collate import collate
from cores.dataset.conversation import exemplars
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.mixture import EvalDataset, TrainMixture
from tests.dataset_toys import (
    LEVELS,
    ToyProcessor,
    square,
    write_image,
    write_json,
    write_reason_seg,
)


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    pairs = [{"q": f"Where is part {i}?", "a": f"It is on thing {i}."} for i in range(8)]
    toy = exemplars.ExemplarLibrary(write_json(tmp_path / "exemplars.json", pairs))
    monkeypatch.setattr(exemplars, "default_library", lambda: toy)


@pytest.fixture
def data(tmp_path):
    """A folder with all four families."""
    root = tmp_path / "data"
    write_reason_seg(root, count=6)
    write_reason_seg(root, name="Other", count=4)
    write_image(root / "coco" / "train2017" / "a.jpg")
    instance = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 5, 0, 5, 5]]}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 12}],
        "annotations": [instance],
    }
    content["categories"] = [{"id": 1, "name": "dog"}]
    write_json(root / "coco" / "annotations" / "instances_train2017.json", content)
    spoken = [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "It is."}]
    write_json(
        root / "llava_dataset" / "llava_instruct_150k.json",
        [{"id": "1", "image": "a.jpg", "conversations": spoken}],
    )
    write_image(root / "synth_sem" / "images" / "train" / "a.jpg")
    (root / "synth_sem" / "annotations" / "train").mkdir(parents=True)
    Image.fromarray(np.ones((10, 12), np.uint8)).save(
        root / "synth_sem" / "annotations" / "train" / "a.png"
    )
    write_json(root / "synth_sem" / "classes.json", ["dog"])
    return root


def mixture(data, dataset="reason_seg", rates=(1,), **kwargs) -> TrainMixture:
    return TrainMixture(data, dataset, rates, LEVELS, **({"samples_per_epoch": 40} | kwargs))


def facts(sample) -> tuple:
    turns = [(c.turns, c.masks.sum()) for c in sample.conversations]
    return sample.name, str(turns), tuple(sample.exemplars)


def test_a_sample_depends_on_seed_epoch_and_index_only(data):
    first, second = mixture(data), mixture(data)
    order = np.random.default_rng(0).permutation(40)
    shuffled = {int(i): facts(second[int(i)]) for i in order}
    assert [facts(first[i]) for i in range(40)] == [shuffled[i] for i in range(40)]
    first.set_epoch(1)
    assert [facts(first[i]) for i in range(40)] != [shuffled[i] for i in range(40)]
    first.set_epoch(0)
    assert facts(first[7]) == shuffled[7]
    assert [facts(mixture(data, seed=1)[i]) for i in range(40)] != [shuffled[i] for i in range(40)]


def test_workers_change_nothing_and_see_the_new_epoch(data):
    train = mixture(data, samples_per_epoch=6)
    loader = DataLoader(train, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 3):
        train.set_epoch(epoch)
        assert [facts(s) for s in loader] == [facts(train[i]) for i in range(6)]


def test_rates_choose_the_families(data):
    names = "sem_seg||coco||reason_seg||vqa"
    train = mixture(
        data,
        names,
        (9, 3, 3, 1),
        samples_per_epoch=800,
        sem_seg_data="synthreason",
        exemplar_count=0,
    )
    found = Counter(train[i].dataset.split("|")[0] for i in range(800))
    shares = {name: found[name] / 800 for name in ("synthreason", "coco", "ReasonSeg", "vqa")}
    # three standard deviations of a share of 9/16 in 800 draws are 0.053
    assert shares == pytest.approx(
        {"synthreason": 9 / 16, "coco": 3 / 16, "ReasonSeg": 3 / 16, "vqa": 1 / 16}, abs=0.055
    )
    assert {
        mixture(data, names, (0, 1, 0, 0), sem_seg_data="synthreason")[i].dataset for i in range(20)
    } == {"coco|train2017"}


def test_several_data_sets_of_one_family(data):
    train = mixture(data, reason_seg_data="ReasonSeg|train||Other|train")
    assert {train[i].dataset for i in range(40)} == {"ReasonSeg|train", "Other|train"}


def test_exemplars_are_drawn_per_sample(data):
    train = mixture(data, exemplar_count=2)
    drawn = [tuple(train[i].exemplars) for i in range(40)]
    assert {len(set(pair)) for pair in drawn} == {2} and len(set(drawn)) > 10
    assert mixture(data, exemplar_count=0)[0].exemplars == []


def test_a_mixture_collates(data):
    names = "sem_seg||coco||reason_seg||vqa"
    train = mixture(data, names, (1, 1, 1, 1), sem_seg_data="synthreason", samples_per_epoch=8)
    batch = collate([train[i] for i in range(8)], ToyProcessor(), LEVELS, "tiny")
    assert batch.sam_pixels.shape[0] == 8 and batch.image_index.max() == 7
    seg = ToyProcessor().tokenizer.convert_tokens_to_ids("[SEG]")
    assert (batch.input_ids == seg).sum(1).tolist() == [len(mask) for mask in batch.target_masks]


def break_after_construction(data):
    """Two of six images become unreadable while training runs."""
    for i in (1, 4):
        (data / "reason_seg" / "ReasonSeg" / "train" / f"{i:03d}.jpg").write_bytes(
            b"\xff\xd8 broken"
        )


def test_a_bad_sample_stops_by_default(data):
    train = mixture(data)
    break_after_construction(data)
    with pytest.raises(DataError, match=r"00[14].jpg: not a readable image"):
        [train[i] for i in range(40)]


def test_a_bad_sample_is_replaced_the_same_way_every_time(data, caplog):
    healthy = [facts(mixture(data)[i]) for i in range(40)]
    trains = [mixture(data, on_bad_sample="skip") for _ in range(2)]
    break_after_construction(data)
    runs = [[facts(train[i]) for i in range(40)] for train in trains]
    assert runs[0] == runs[1]
    assert all("001.jpg" not in name and "004.jpg" not in name for name, *_ in runs[0])
    replaced = [i for i in range(40) if runs[0][i] != healthy[i]]
    assert 0 < len(replaced) <= trains[0].bad_samples == trains[1].bad_samples
    assert all("001.jpg" in healthy[i][0] or "004.jpg" in healthy[i][0] for i in replaced), (
        "only bad samples change"
    )
    assert (
        caplog.text.count("bad sample replaced") == 2 * trains[0].bad_samples
        and "001.jpg" in caplog.text
    )


def test_a_data_set_that_is_bad_throughout_is_an_error_even_when_skipping(data):
    train = mixture(data, on_bad_sample="skip")
    for path in (data / "reason_seg" / "ReasonSeg" / "train").glob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="20 draws in a row"):
        train[0]


def test_a_programming_error_is_never_taken_for_a_bad_sample(data, monkeypatch):
    train = mixture(data, on_bad_sample="skip")

    def broken(index, rng):
        raise ValueError("a bug")

    monkeypatch.setattr(train.families[0][0], "sample", broken)
    with pytest.raises(ValueError, match="a bug"):
        train[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"dataset": "reasonseg"},
            "unknown data set 'reasonseg'; known: sem_seg, refer_seg, coco, reason_seg, vqa",
        ),
        (
            {"dataset": "refer_seg", "refer_seg_data": "refcoc"},
            "unknown referring data set 'refcoc'; known: refclef, refcoco,",
        ),
        ({"dataset": "reason_seg||"}, 'joined by "||"'.replace("|", r"\|")),
        ({"rates": (1, 2)}, r"--sample_rates \[1, 2\]: give 1 numbers"),
        ({"rates": (0,)}, "not all 0"),
        ({"rates": (float("nan"),)}, "none negative"),
        ({"samples_per_epoch": 0}, "samples_per_epoch must be at least 1"),
        ({"on_bad_sample": "ignore"}, 'must be "raise" or "skip"'),
        ({"exemplar_count": 9}, "9 exemplars wanted, only 8"),
        ({"exemplar_count": -1}, "must not be negative"),
        (
            {"dataset": "sem_seg", "sem_seg_data": "mars"},
            "unknown semantic data set 'mars'; known: ade20k, .*paco_lvis",
        ),
        ({"reason_seg_data": "ReasonSeg|val"}, "no such split"),
        ({"num_classes_per_sample": 0}, "num_classes_per_sample"),
    ],
)
def test_contradictions_end_at_construction(data, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        mixture(data, **kwargs)
    assert "\n" not in str(error.value)


def test_a_missing_folder(tmp_path):
    with pytest.raises(
        MissingDataError, match="nowhere: does not exist; the data is expected there"
    ):
        mixture(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere: does not exist"):
        EvalDataset(tmp_path / "nowhere", "ReasonSeg|val", LEVELS)


def test_index_outside_is_the_end_of_iteration(data):
    assert len(list(mixture(data, samples_per_epoch=3))) == 3
    assert len(list(EvalDataset(data, "ReasonSeg|train", LEVELS))) == 6


def test_evaluation_is_stable_whatever_the_order(data):
    first, second = (
        EvalDataset(data, "ReasonSeg|train", LEVELS, exemplar_count=2) for _ in range(2)
    )
    backwards = [facts(second[i]) for i in reversed(range(6))][::-1]
    assert [facts(first[i]) for i in range(6)] == backwards
    assert len({f[2] for f in backwards}) > 1, "exemplars differ between images"
    assert [first[i].id for i in range(6)] == [f"{i:03d}" for i in range(6)]
    other = EvalDataset(data, "ReasonSeg|train", LEVELS, exemplar_count=2, seed=1)
    assert [facts(other[i])[:2] for i in range(6)] == [f[:2] for f in backwards]
    assert [facts(other[i])[2] for i in range(6)] != [f[2] for f in backwards]


def test_first_or_all_texts(data):
    assert [
        len(EvalDataset(data, "ReasonSeg|train", LEVELS, texts=t)[0].conversations)
        for t in ("first", "all")
    ] == [
        1,
        2,
    ]


@pytest.mark.parametrize("name", ["coco|train2017", "synthreason|train", "ReasonSeg|trainlong"])
def test_other_evaluation_sets(data, name):
    dataset = EvalDataset(data, name, LEVELS, exemplar_count=0)
    assert dataset[0].dataset == name and len(dataset) == {
        "coco|train2017": 1,
        "synthreason|train": 1,
    }.get(name, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ReasonSeg", "names no split"),
        ("ReasonSeg|val", "no such split of ReasonSeg; there are: train"),
        ("Nothing|val", "no such data set; .* holds: Other, ReasonSeg"),
        ("coco|val2017", "instances_val2017.json: does not exist"),
        ("ade20k|validation", "ade20k: does not exist"),
    ],
)
def test_an_evaluation_set_that_does_not_exist(data, name, message):
    with pytest.raises(ValueError, match=message):
        EvalDataset(data, name, LEVELS)


def test_torch_random_state_is_left_alone(data):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    mixture(data)[0]
    assert torch.equal(torch.rand(1), expected)


def test_level_lists_reach_the_answers(data):
    for levels in (["SEG"], ["LOC", "PART", "SEG"]):
        train = TrainMixture(data, "reason_seg", [1], levels, 5)
        batch = collate([train[i] for i in range(5)], ToyProcessor(), levels, "tiny")
        tokens = [ToyProcessor().tokenizer.convert_tokens_to_ids(f"[{level}]") for level in levels]
        assert all((batch.input_ids == t).sum() == len(batch.info) for t in tokens)


def test_corrupt_file_is_found_before_training(data):
    write_json(data / "reason_seg" / "ReasonSeg" / "train" / "002.json", {"text": ["q"]})
    with pytest.raises(DataError, match='002.json: has no "shapes"'):
        mixture(data)
    write_json(
        data / "reason_seg" / "ReasonSeg" / "train" / "002.json",
        {"text": ["q"], "shapes": [square(0, 0, 1, 1)]},
    )
    break_after_construction(data)
    with pytest.raises(DataError, match="001.jpg: not a readable image"):
        mixture(data)
