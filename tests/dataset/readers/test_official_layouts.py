"""Every published data set in its official layout: each mask exact, through the evaluation set, the
mixture and a training run."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle_codec
from torch.utils.data import DataLoader

from cores import train_ds
from cores.dataset.collate import collate
from cores.dataset.conversation.turns import answer_text
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.mixture import EvalDataset, TrainMixture
from cores.dataset.readers.llm_seg40k import LlmSeg40K
from cores.dataset.readers.parts import PART_SOURCES, PartSegmentation, category_name
from cores.dataset.readers.referring import (
    ReferringSegmentation,
    read_references,
    validation_images,
)
from cores.dataset.readers.semantic import COCOSTUFF_CLASSES, SemanticSegmentation
from cores.dataset.readers.usable import coco_number
from cores.dataset.sample import LoaderOptions, Sample
from tests import official_layouts as official
from tests.backbone_toys import flags, toys
from tests.dataset_toys import SHARED, ToyProcessor

LEVELS = ("LOC", "SEG")
TRAIN = LoaderOptions(LEVELS)
EVAL = LoaderOptions(LEVELS, training=False)
SEM_SEG = "ade20k||cocostuff||mapillary||paco_lvis||pascal_part||partimagenet"
REFER_SEG = "refclef||refcoco||refcoco+||refcocog||grefcoco"
REASON_SEG = "ReasonSeg|train||LLM-Seg40K|train"
NAMES = [
    "ade20k|training",
    "ade20k|validation",
    "cocostuff|train2017",
    "mapillary|training",
    "paco_lvis|train",
    "pascal_part|train",
    "partimagenet|train",
    "coco|train2017",
    "refcoco|unc|train",
    "refcoco|unc|val",
    "refcoco|unc|testA",
    "refcoco|unc|testB",
    "refcoco+|unc|train",
    "refcoco+|unc|val",
    "refcoco+|unc|testA",
    "refcoco+|unc|testB",
    "refcocog|umd|train",
    "refcocog|umd|val",
    "refcocog|umd|test",
    "refcocog|google|train",
    "refcocog|google|val",
    "refclef|unc|train",
    "refclef|unc|val",
    "refclef|unc|testA",
    "refclef|unc|testC",
    "refclef|unc|test",
    "grefcoco|unc|train",
    "grefcoco|unc|val",
    "LLM-Seg40K|train",
    "LLM-Seg40K|val",
    "LLM-Seg40K|test",
    "ReasonSeg|train",
    "ReasonSeg|val",
    "ReasonSeg|test",
    "ReasonSeg|trainlong",
    "ReasonSeg|trainshort",
    "ReasonSeg|vallong",
    "ReasonSeg|valshort",
    "ReasonSeg|testlong",
    "ReasonSeg|testshort",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    return root, official.write_everything(root)


@pytest.fixture
def root(written, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(written[0], tmp_path / "data")
    return tmp_path / "data"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def same(found: np.ndarray | None, expected: np.ndarray | None) -> bool:
    return (
        found is None if expected is None else found is not None and np.array_equal(found, expected)
    )


def check(conversation, expected: official.Expected) -> None:
    assert same(conversation.masks, expected.mask[None])
    assert same(conversation.ignore, expected.ignore)
    assert same(conversation.host_masks, None if expected.host is None else expected.host[None])


# ------------------------------------------------------------------------------ all of them at once


def test_no_layout_is_forgotten(written):
    assert sorted(written[1]) == sorted(NAMES)
    root = written[0]
    assert {path.name for path in root.iterdir()} == {
        "ade20k",
        "coco",
        "cocostuff",
        "ego_objects",
        "llava_dataset",
        "mapillary",
        "reason_seg",
        "refer_seg",
        "vlpart",
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_target_of_an_evaluation_set_is_exact(written, name):
    root, layout = written
    data = EvalDataset(root, name, LEVELS, exemplar_count=0)
    samples = [data[i] for i in range(len(data))]
    assert [s.id for s in samples] == sorted(layout[name]) and {s.dataset for s in samples} == {
        name
    }
    for sample in samples:
        expected = layout[name][sample.id]
        assert len(sample.conversations) == len(expected)
        for conversation, one in zip(sample.conversations, expected, strict=True):
            ((question, reply),) = conversation.turns
            asked = one.phrases[0]
            assert question in (
                f"What is {asked} in this image? Please output segmentation mask.",
                f"{asked} Please output segmentation mask.",
            )
            assert answer_text(reply) == "It appears on [LOC]. It is [SEG]."
            check(conversation, one)


def find(question: str, expected: list[official.Expected]) -> official.Expected:
    """The target that a question in any wording asks for; the longest name, as "the car" is also in
    "the car steering wheel"."""
    return max(
        (one for one in expected if any(phrase in question for phrase in one.phrases)),
        key=lambda one: max(len(phrase) for phrase in one.phrases if phrase in question),
    )


def everything(root: Path, **more) -> TrainMixture:
    data = {
        "sem_seg_data": SEM_SEG,
        "refer_seg_data": REFER_SEG,
        "reason_seg_data": REASON_SEG,
        "exemplar_count": 0,
    }
    names = "sem_seg||refer_seg||coco||vqa||reason_seg"
    return TrainMixture(
        root, names, (9, 6, 2, 1, 3), LEVELS, **({"samples_per_epoch": 400} | data | more)
    )


def test_every_target_of_the_training_mixture_is_exact(written):
    root, layout = written
    mixture = everything(root)
    found, forms = Counter(), set()
    for index in range(len(mixture)):
        sample: Sample = mixture[index]
        found[sample.dataset] += 1
        assert 1 <= len(sample.conversations) <= 3
        if sample.kind == "vqa":
            assert sample.conversations[0].turns == [("What is it?", ["A dog."])]
            continue
        for conversation in sample.conversations:
            ((question, reply),) = conversation.turns
            check(conversation, find(question, layout[sample.dataset][sample.id]))
            assert [part.level for part in reply if not isinstance(part, str)] == ["LOC", "SEG"]
            forms |= {
                form
                for form in ("the bus license plate", "the license plate of the bus")
                if form in question
            }
    trained = {
        name
        for name in NAMES
        if name.split("|")[-1] in ("train", "training", "train2017") and "google" not in name
    }
    assert found.keys() == trained | {"vqa|llava_instruct_150k"} and len(forms) == 2
    assert min(found.values()) >= 4 and mixture.bad_samples == 0


def test_the_mixture_is_a_function_of_seed_epoch_and_index_also_in_workers(written):
    def facts(sample):
        return sample.name, str([(c.turns, c.masks.sum()) for c in sample.conversations])

    first, second = (
        everything(written[0], samples_per_epoch=24),
        everything(written[0], samples_per_epoch=24),
    )
    expected = [facts(first[i]) for i in range(24)]
    assert [facts(second[i]) for i in reversed(range(24))] == expected[::-1]
    assert [facts(s) for s in DataLoader(second, batch_size=None, num_workers=2)] == expected
    second.set_epoch(1)
    assert [facts(second[i]) for i in range(24)] != expected


def test_annotations_are_indexed_once(written, monkeypatch):
    """Whatever opens them later, in whatever process, does not read the JSON."""
    everything(written[0])
    monkeypatch.setattr(
        "cores.dataset.files.index.build_coco", lambda *_: pytest.fail("parsed again")
    )
    everything(written[0])


def test_a_training_run_on_the_whole_mixture(written):
    changes = {
        "dataset": "sem_seg||refer_seg||vqa||reason_seg",
        "sample_rates": "9,3,3,1",
        "sem_seg_data": SEM_SEG,
        "refer_seg_data": REFER_SEG,
        "reason_seg_data": REASON_SEG,
        "val_dataset": "grefcoco|unc|val",
        "exclude_val": "true",
        "dataset_dir": written[0],
        "exp_name": "published",
        "epochs": 1,
        "steps_per_epoch": 4,
        "batch_size": 3,
        "eval_mode": "teacher_forced",
    }
    assert train_ds.main(flags(toys(), **changes)) == 0
    metrics = json.loads((toys() / "runs/published/metrics.json").read_text())
    assert metrics["teacher_forced"]["n"] == 2
    steps = [
        json.loads(line) for line in (toys() / "runs/published/log.jsonl").read_text().splitlines()
    ]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert json.loads((toys() / "runs/published/config.json").read_text())["exclude_val"] is True
    again = [
        "--eval_only",
        "--resume",
        str(toys() / "runs/published"),
        "--val_dataset",
        "cocostuff|train2017",
    ]
    assert train_ds.main([*again, "--exp_name", "stuff"]) == 0
    asked = sum(len(one) for one in written[1]["cocostuff|train2017"].values())
    assert (
        json.loads((toys() / "runs/stuff/metrics.json").read_text())["teacher_forced"]["n"] == asked
    ), "one photo asks nothing"


# ------------------------------------------------------------------------------------ --exclude_val


def test_excluded_photos_are_nowhere_in_training(written, caplog):
    root = written[0]
    assert validation_images(root) == official.EXCLUDED
    caplog.set_level(logging.INFO)
    mixture = everything(root, exclude_val=True)
    shown = {(s.dataset, Path(s.image_path)) for s in (mixture[i] for i in range(300))}
    in_coco = {
        (d, coco_number(p.name))
        for d, p in shown
        if "train2017" in p.parts or "train2014" in p.parts
    }
    assert {number for _, number in in_coco} & official.EXCLUDED == set()
    for name in (
        "coco|train2017",
        "cocostuff|train2017",
        "paco_lvis|train",
        "vqa|llava_instruct_150k",
        "refcoco|unc|train",
    ):
        assert (name, official.TRAIN) in in_coco, f"{name} still trains"
    # one line for each source, with the number that is missing
    lines = [record.message for record in caplog.records if "--exclude_val" in record.message]
    counts = {line.split(": ")[1]: line.split(": ")[2] for line in lines}
    opened = {loader.dataset for family in mixture.families for loader in family}
    assert len(lines) == len(counts) and opened - counts.keys() == {
        "ade20k|training",
        "mapillary|training",
    }, "no photo of COCO"
    assert counts["coco|train2017"] == "1 of 3 entries are left out"
    assert counts["cocostuff|train2017"] == "4 of 6 entries are left out"
    assert (
        counts["paco_lvis|train"]
        == counts["LLM-Seg40K|train"].replace("0", "1")
        == "1 of 2 entries are left out"
    )
    assert counts["vqa|llava_instruct_150k"] == "2 of 3 entries are left out"
    assert counts["refcoco|unc|train"] == "0 of 1 entries are left out"


def test_evaluation_is_never_reduced(written):
    assert len(EvalDataset(written[0], "refcoco|unc|val", LEVELS)) == 1


@pytest.mark.parametrize(
    "name", ["refcoco/refs(unc).p", "refcoco+/refs(unc).p", "refcocog/refs(umd).p", "refcocog"]
)
def test_exclusion_needs_all_three_files(root, name):
    path = root / "refer_seg" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(
        MissingDataError, match=r"--exclude_val needs the references of refcoco\+?g?, (unc|umd): "
    ) as error:
        everything(root, exclude_val=True)
    assert "\n" not in str(error.value)


def test_a_source_without_any_photo_left_is_an_error(root):
    spoken = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    entry = {"id": "1", "image": f"{official.VAL:012d}.jpg", "conversations": spoken}
    official.write_json(root / "llava_dataset/llava_instruct_150k.json", [entry])
    with pytest.raises(
        DataError, match=r"vqa\|llava_instruct_150k: --exclude_val leaves none of its 1 entries"
    ):
        everything(root, exclude_val=True)
    everything(root)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("000000581857.jpg", 581857),
        ("train2017/000000581857.jpg", 581857),
        ("COCO_train2014_000000581857.jpg", 581857),
        ("COCO_val2014_000000000042.png", 42),
        ("2008_000002.jpg", None),
        ("19.jpg", None),
        ("n01440764_10029.JPEG", None),
        ("0000005818570.jpg", None),
        ("", None),
    ],
)
def test_the_number_of_a_photo(name, number):
    assert coco_number(name) == number


# ---------------------------------------------------------------------------------------- referring


def test_training_means_different_objects_first(written):
    loader = ReferringSegmentation(written[0], "refcoco", TRAIN)
    assert loader.dataset == "refcoco|unc|train" and len(loader) == 1
    for seed in range(20):
        sample = loader.sample(0, rng(seed))
        questions = " ".join(c.turns[0][0] for c in sample.conversations)
        assert len(sample.conversations) == 3 and not (
            "left man" in questions and "guy in red" in questions
        )
    all_of_them = ReferringSegmentation(
        written[0], "refcoco|unc|train", LoaderOptions(LEVELS, num_classes_per_sample=9)
    )
    assert len(all_of_them.sample(0, rng()).conversations) == 5, "an empty sentence is none"


def test_training_reaches_the_other_division(written):
    assert ReferringSegmentation(written[0], "refcocog", TRAIN).dataset == "refcocog|umd|train"
    assert (
        ReferringSegmentation(written[0], "refcocog|google", TRAIN).dataset
        == "refcocog|google|train"
    )


def test_empty_targets_train_as_zeros(written):
    options = LoaderOptions(LEVELS, num_classes_per_sample=4)
    sample = ReferringSegmentation(written[0], "grefcoco", options).sample(0, rng())
    batch = collate([sample], ToyProcessor(), LEVELS, "tiny")
    empty = [not mask.any() for mask in batch.target_masks]
    assert sum(empty) == 1 and all(
        mask.shape == (1, *sample.image.shape[:2]) for mask in batch.target_masks
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "refcoc|unc|val",
            (
                "unknown referring data set 'refcoc'; known: refclef, refcoco, refcoco\\+,"
                " refcocog, grefcoco"
            ),
        ),
        (
            "refcoco|unc|test1",
            "no split 'test1' in the division 'unc'; there are: testA, testB, train, val",
        ),
        ("refcoco|umd|val", "has no references divided by 'umd'; there are: unc"),
        ("refcocog|google|test", "no split 'test' in the division 'google'; there are: train, val"),
        ("refcocog|unc|val", "has no references divided by 'unc'; there are: google, umd"),
        ("refcocog|val", 'write it as "refcocog|umd|val"'.replace("|", r"\|")),
        ("grefcoco|unc|", r'write it as "grefcoco\|unc\|val"'),
        ("refcoco|unc|val|x", r'write it as "refcoco\|unc\|val"'),
    ],
)
def test_a_wrong_name_lists_the_right_ones(written, spec, message):
    with pytest.raises(ValueError, match=message) as error:
        ReferringSegmentation(written[0], spec, EVAL)
    assert "\n" not in str(error.value)


GOOD = official.reference(0, 9, 90, "val", "left man")


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([], "must be a non-empty list of references"),
        ({"a": 1}, "must be a non-empty list of references"),
        ([GOOD, 3], "reference 1 is not an object"),
        ([GOOD | {"image_id": "9"}], 'reference 0: "image_id" and "ann_id" must be whole numbers'),
        ([GOOD | {"ann_id": []}], 'reference 0: "image_id" and "ann_id" must be whole numbers'),
        (
            [GOOD | {"ann_id": [1, None]}],
            'reference 0: "image_id" and "ann_id" must be whole numbers',
        ),
        ([GOOD | {"split": None}], 'reference 0: "split" must be a text'),
        (
            [GOOD | {"sentences": ["left man"]}],
            r'reference 0: "sentences" must be a list of \{"sent": text, …\}',
        ),
        ([GOOD | {"sentences": []}], r"the references of refcoco\|unc\|val have no sentences"),
        ([GOOD | {"ann_id": 5}], "instances.json: lacks the annotation 5"),
        ([GOOD | {"image_id": 5}], "instances.json: lacks the image 5"),
    ],
)
def test_broken_references_name_file_entry_and_field(root, references, message):
    (root / "refer_seg/refcoco/refs(unc).p").write_bytes(official.pickled(references))
    with pytest.raises(DataError, match=message) as error:
        ReferringSegmentation(root, "refcoco|unc|val", EVAL)
    assert "\n" not in str(error.value)


def test_missing_files_of_the_referring_sets(root, tmp_path):
    with pytest.raises(
        MissingDataError, match="refer_seg: does not exist; the referring data sets"
    ):
        ReferringSegmentation(tmp_path / "nowhere", "refcoco|unc|val", EVAL)
    (
        root / "refer_seg/images/mscoco/images/train2014" / f"{official.photo(official.VAL)}.jpg"
    ).unlink()
    with pytest.raises(
        MissingDataError,
        match="1 of 1 images are not in .*, for example COCO_train2014_000000000025.jpg",
    ):
        ReferringSegmentation(root, "refcoco|unc|val", EVAL)
    shutil.rmtree(root / "refer_seg/images/mscoco")
    with pytest.raises(MissingDataError, match="train2014: does not exist; the images of refcoco"):
        ReferringSegmentation(root, "refcoco|unc|val", EVAL)
    (root / "refer_seg/refclef/instances.json").unlink()
    with pytest.raises(MissingDataError, match="refclef/instances.json: does not exist"):
        ReferringSegmentation(root, "refclef|unc|val", EVAL)


def test_references_may_lie_in_a_pickle_of_the_json(root):
    folder = root / "refer_seg/grefcoco"
    references = read_references(folder, "unc")
    content = json.loads((folder / "grefs(unc).json").read_text())
    (folder / "grefs(unc).json").rename(folder / "other.json")
    (folder / "grefs(unc).p").write_bytes(official.pickled(content))
    assert read_references(folder, "unc") == references and len(references) == 6


# ----------------------------------------------------------------------------------------- semantic


def test_a_photo_of_void_classes_asks_nothing(written):
    loader = SemanticSegmentation(written[0], "cocostuff", TRAIN)
    number = next(i for i in range(len(loader)) if f"{official.CROWDED:012d}" in loader.files[i][0])
    with pytest.raises(DataError, match="holds only classes that are not asked for"):
        loader.sample(number, rng())
    train = TrainMixture(written[0], "sem_seg", (1,), LEVELS, 60, sem_seg_data="cocostuff")
    names = {train[i].id for i in range(60)}
    assert len(names) == 5 and f"{official.CROWDED:012d}" not in names and train.bad_samples == 0


def test_errors_of_label_maps(root):
    for split in ("../images", "..", "/tmp"):
        with pytest.raises(ValueError, match=f"'{split}' is no split"):
            SemanticSegmentation(root, "cocostuff", EVAL, split)
    with pytest.raises(
        MissingDataError, match="cocostuff/val2017: does not exist|coco/val2017: does not exist"
    ):
        SemanticSegmentation(root, "cocostuff", EVAL, "val2017")
    (root / f"coco/train2017/{official.VAL:012d}.jpg").unlink()
    with pytest.raises(
        MissingDataError,
        match="1 of 6 images are not in .*coco/train2017, for example 000000000025.jpg",
    ):
        SemanticSegmentation(root, "cocostuff", EVAL)
    official.write_label(
        root / f"cocostuff/train2017/{official.TRAIN:012d}.png", np.full((22, 34), 200, np.uint8)
    )
    loader = SemanticSegmentation(root, "cocostuff", LoaderOptions(LEVELS, skip_missing=True))
    with pytest.raises(
        DataError, match="000000000009.png: holds the value 200, but there are only 182 classes"
    ):
        loader.sample(0, rng())
    for path in (root / "cocostuff/train2017").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="split cocostuff|train2017 is empty"):
        SemanticSegmentation(root, "cocostuff", TRAIN)


@pytest.mark.parametrize(
    "content", [{}, {"labels": []}, {"labels": [{"name": "a"}]}, {"labels": ["bird"]}, []]
)
def test_a_broken_mapillary_config(root, content):
    official.write_json(root / "mapillary/config_v2.0.json", content)
    with pytest.raises(
        DataError, match=r"config_v2.0.json: must be a non-empty list of class names"
    ) as error:
        SemanticSegmentation(root, "mapillary", TRAIN)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("text", "separator", "phrase"),
    [
        ("car_(automobile):wheel", ":", "the wheel of the car"),
        ("tape_(sticky_cloth_or_paper):roll", ":", "the roll of the tape"),
        ("car_(automobile)", ":", "the car"),
        ("laptop_computer:base_panel", ":", "the base panel of the laptop computer"),
        ("vase:colied_tube", ":", "the coiled tube of the vase"),
        ("bus:license plate", ":", "the license plate of the bus"),
        ("Car Side Mirror", " ", "the side mirror of the car"),
        ("Bicycle Tier", " ", "the tire of the bicycle"),
    ],
)
def test_names_of_parts(text, separator, phrase):
    assert category_name(text, separator).phrase(None) == phrase


def test_images_of_partimagenet_in_other_places(root):
    folder = root / "vlpart/partimagenet"
    before = PartSegmentation(root, "partimagenet", EVAL).sample(0, rng())
    (folder / "images").rename(folder / "train")
    assert (
        PartSegmentation(root, "partimagenet", EVAL).sample(0, rng()).image == before.image
    ).all()
    (folder / "train/n01440764/n01440764_10029.JPEG").rename(folder / "train/n01440764_10029.JPEG")
    assert (
        PartSegmentation(root, "partimagenet", EVAL).sample(0, rng()).image == before.image
    ).all()
    content = json.loads((folder / "train.json").read_text())
    content["images"][0]["file_name"] = "n01440764/n01440764_10029.JPEG"
    official.write_json(folder / "train.json", content)
    with pytest.raises(
        MissingDataError,
        match="1 of 1 images are not in .*, for example n01440764/n01440764_10029.JPEG",
    ):
        PartSegmentation(root, "partimagenet", EVAL)
    (folder / "train/n01440764_10029.JPEG").rename(folder / "train/n01440764/n01440764_10029.JPEG")
    assert (
        PartSegmentation(root, "partimagenet", EVAL).sample(0, rng()).image == before.image
    ).all()


def test_errors_of_parts(root):
    with pytest.raises(
        ValueError,
        match="unknown data set of parts 'paco'; known: paco_lvis, pascal_part, partimagenet",
    ):
        PartSegmentation(root, "paco", TRAIN)
    with pytest.raises(MissingDataError, match="paco_lvis_v1_val.json: does not exist"):
        PartSegmentation(root, "paco_lvis", EVAL, "val")
    shutil.rmtree(root / "vlpart/pascal_part/VOCdevkit")
    with pytest.raises(
        MissingDataError, match="JPEGImages: does not exist; the images of pascal_part"
    ):
        PartSegmentation(root, "pascal_part", TRAIN)
    path = root / "vlpart/partimagenet/train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [content["annotations"][1]]
    official.write_json(path, content)
    with pytest.raises(DataError, match="n01440764_10029.JPEG: no annotation in .* has a pixel"):
        PartSegmentation(root, "partimagenet", TRAIN).sample(0, rng())
    assert PartSegmentation(root, "partimagenet", EVAL).sample(0, rng()).conversations == []
    content["annotations"][0]["segmentation"] = [[1, 2, 3]]
    official.write_json(path, content)
    with pytest.raises(DataError, match='train.json: annotation 1 "segmentation" must be polygons'):
        PartSegmentation(root, "partimagenet", TRAIN).sample(0, rng())
    content["annotations"] = []
    official.write_json(path, content)
    with pytest.raises(DataError, match="train.json: is empty"):
        PartSegmentation(root, "partimagenet", TRAIN)
    shutil.rmtree(root / "vlpart/paco")
    with pytest.raises(
        MissingDataError, match="annotations: does not exist; the paco_lvis data is expected there"
    ):
        PartSegmentation(root, "paco_lvis", TRAIN)


# ---------------------------------------------------------------------------------------- reasoning


def test_questions_of_llm_seg40k_in_several_wordings(written):
    root = written[0]
    every = EvalDataset(root, "LLM-Seg40K|val", LEVELS, texts="all")
    assert sorted(len(every[i].conversations) for i in range(2)) == [1, 3]
    assert all(c.is_sentence for i in range(2) for c in every[i].conversations)
    loader = LlmSeg40K(root, "LLM-Seg40K|train", LoaderOptions(LEVELS, num_classes_per_sample=2))
    drawn = [
        [c.turns[0][0].split(" Please")[0] for c in loader.sample(1, rng(s)).conversations]
        for s in range(20)
    ]
    assert {tuple(sorted(d)) for d in drawn} == {
        ("What shines?", "Where would one sit?"),
        ("What gives light?", "Where would one sit?"),
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"from_dataset": "lvis"}, '"from_dataset" must be one of coco, ego_objects'),
        ({"qa_pairs": {}}, '"qa_pairs" must be a list of questions'),
        ({"qa_pairs": [{"question": " ", "rle_seg": {}}]}, 'question 0: "question" must be a text'),
        ({"qa_pairs": [{"question": "q", "rle_seg": None}]}, 'question 0: "rle_seg" must be'),
        ({"qa_pairs": []}, "validation.json: holds no question"),
    ],
)
def test_broken_entries_of_llm_seg40k(root, entry, message):
    path = root / "reason_seg/LLM-Seg40K/validation.json"
    official.write_json(
        path, {"000000000025.jpg": {"from_dataset": "coco", "qa_pairs": []} | entry}
    )
    with pytest.raises(DataError, match=message) as error:
        EvalDataset(root, "LLM-Seg40K|val", LEVELS)
    assert "\n" not in str(error.value)


def test_missing_files_of_llm_seg40k(root):
    with pytest.raises(
        MissingDataError, match="valid.json: no such split; there are: test, train, validation"
    ):
        EvalDataset(root, "LLM-Seg40K|valid", LEVELS)
    shutil.rmtree(root / "ego_objects")
    with pytest.raises(MissingDataError, match="ego_objects/images: does not exist"):
        EvalDataset(root, "LLM-Seg40K|val", LEVELS)
    path = root / "reason_seg/LLM-Seg40K/test.json"
    wrong = official.compressed(np.ones((3, 4), bool))
    pair = {"question": "q?", "answer": "a", "rle_seg": wrong}
    official.write_json(path, {"000000000030.jpg": {"from_dataset": "coco", "qa_pairs": [pair]}})
    with pytest.raises(
        DataError, match=r'test.json: "000000000030.jpg rle_seg" is 3×4 .* but its image is 22×30'
    ):
        EvalDataset(root, "LLM-Seg40K|test", LEVELS)[0]
    with pytest.raises(ValueError, match='write it as "LLM-Seg40K'):
        LlmSeg40K(root, "LLM-Seg40K", TRAIN)


def test_explanations_of_reason_seg_follow_the_tokens(written):
    mixture = TrainMixture(
        written[0], "reason_seg", (1,), LEVELS, 30, explanatory=1.0, exemplar_count=0
    )
    said = {
        s.id: answer_text(s.conversations[0].turns[0][1]) for s in (mixture[i] for i in range(30))
    }
    assert said["long_o"].endswith('[SEG]. It is "the" table, as it stands there.') and said[
        "short_o"
    ].endswith("[SEG].")


# ------------------------------------------------------------------------------------ the generator


def test_the_generator_writes_run_lengths_as_coco_does():
    for seed in range(40):
        generator = rng(seed)
        mask = (
            generator.random((int(generator.integers(1, 40)), int(generator.integers(1, 40))))
            > generator.random()
        )
        assert (rle_codec.decode(official.compressed(mask)).astype(bool) == mask).all()
        packed = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert packed["counts"].decode() == official.compressed(mask)["counts"]
        uncompressed = official.runs(mask)
        assert (
            rle_codec.decode(rle_codec.frPyObjects(uncompressed, *mask.shape)).astype(bool) == mask
        ).all()


# --------------------------------------------------------------------------------------- real names


def categories(name: str):
    path = SHARED / "samples/categories" / name
    if not path.exists():
        pytest.skip(f"the real lists are not at {path}")
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text().splitlines()


def test_real_names_of_cocostuff():
    official_names = [line.partition(": ")[2] for line in categories("cocostuff_labels_182.txt")][
        1:
    ]
    ours = json.loads(COCOSTUFF_CLASSES.read_text())
    assert len(ours) == len(set(ours)) == 182
    assert [(a, b) for a, b in zip(official_names, ours, strict=True) if a != b] == [
        ("sky-other", "sky")
    ]
    assert [line.partition(": ")[2] for line in categories("LISA_cocostuff_classes.txt")][
        1:
    ] == ours


@pytest.mark.parametrize(
    ("file", "source", "things", "parts"),
    [
        ("paco_lvis_v1_train_cat_info.json", "paco_lvis", 75, 456),
        ("pascal_part_categories_VLPart.json", "pascal_part", 0, 93),
        ("partimagenet_categories_VLPart.json", "partimagenet", 0, 40),
    ],
)
def test_real_names_of_parts_are_readable(file, source, things, parts):
    names = [
        category_name(entry["name"], PART_SOURCES[source].separator) for entry in categories(file)
    ]
    assert (sum(n.part is None for n in names), sum(n.part is not None for n in names)) == (
        things,
        parts,
    )
    phrases = [name.phrase(None) for name in names]
    assert len(set(phrases)) == things + parts
    assert all(
        set(phrase) <= set("abcdefghijklmnopqrstuvwxyz ") and "  " not in phrase
        for phrase in phrases
    )
    assert {name.thing for name in names if name.part} <= {
        n.thing for n in names if n.part is None
    } or not things
