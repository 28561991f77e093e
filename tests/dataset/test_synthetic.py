"""SynthReason: deterministic, exact, disjoint between splits, and out of reach for trivial
answers."""

import json

import cv2
import numpy as np
import pytest

from cores.dataset.files.rle import decode_rle
from cores.dataset.synthetic import write as synthetic
from cores.dataset.synthetic.queries import make_query
from cores.dataset.synthetic.scenes import make_scene
from cores.dataset.synthetic.vocabulary import EXPLICIT, IMPLICIT, PURPOSES, held_out
from cores.utils.evaluation.baselines import SceneBaselines


def scenes(count: int, seed: int = 3):
    rng = np.random.default_rng(seed)
    return [make_scene(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "synth"
    return synthetic.write_synthreason(out, train=6, val=4, semantic=3, seed=5)


def records(folder, split):
    return [
        json.loads(p.read_text())
        for p in sorted((folder / "reason_seg" / "SynthReason" / split).glob("*.json"))
    ]


def test_the_same_seed_gives_the_same_scene_and_queries():
    first, second = (make_scene(np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    draws = [make_query(scene, "val", np.random.default_rng(1)) for scene in (first, second)]
    assert draws[0] == draws[1]


def test_four_objects_of_one_family_with_masks_that_do_not_overlap():
    for scene in scenes(10):
        assert len(scene.objects) == 4
        assert len({obj.family for obj in scene.objects}) == 1
        assert len({(obj.category, obj.colour) for obj in scene.objects}) == 4
        assert np.sum([obj.mask for obj in scene.objects], axis=0).max() == 1
        for obj in scene.objects:
            assert np.sum([part.mask for part in obj.parts], axis=0).max() == 1
            assert not any((part.mask & ~obj.mask).any() for part in obj.parts)


def test_splits_share_no_wording_and_no_combination():
    assert not {*EXPLICIT["train"], *IMPLICIT["train"]} & {*EXPLICIT["val"], *IMPLICIT["val"]}
    rng = np.random.default_rng(0)
    for scene in scenes(40):
        for split in ("train", "val"):
            query = make_query(scene, split, rng, texts=3)
            obj = scene.objects[query.object_index]
            if query.is_sentence:
                purposes = [
                    p for p in PURPOSES[query.part] if any(p in text for text in query.texts)
                ]
                assert purposes
                assert all(
                    held_out(obj.category, query.part, p) == (split == "val") for p in purposes
                )
            else:
                assert held_out(obj.colour, obj.category, query.part) == (split == "val")
                # the combination that is new is named
                assert split == "train" or obj.colour in query.texts[0]


def test_a_query_names_one_object_only():
    rng = np.random.default_rng(2)
    for scene in scenes(40):
        query = make_query(scene, "train", rng)
        text, asked = query.texts[0], scene.objects[query.object_index]
        if asked.colour not in text:
            assert sum(obj.category == asked.category for obj in scene.objects) == 1


def test_written_masks_are_exact_and_images_are_readable(folder):
    for record in records(folder, "val"):
        image = cv2.imread(str(folder / "reason_seg" / "SynthReason" / "val" / record["image"]))
        assert image.shape == (128, 128, 3)
        target = decode_rle(record["target_rle"], (128, 128), "record", "target_rle")
        host = decode_rle(record["host_rle"], (128, 128), "record", "host_rle")
        assert target.any()
        assert not (target & ~host).any()
        owner = record["scene"]["objects"][record["target"]["object"]]
        parts = [
            decode_rle(p["rle"], (128, 128), "r", "rle")
            for p in owner["parts"]
            if p["name"] == record["target"]["part"]
        ]
        assert np.array_equal(target, np.any(parts, axis=0))


def test_label_maps_name_the_categories(folder):
    names = json.loads((folder / "synth_sem" / "classes.json").read_text())
    for path in (folder / "synth_sem" / "annotations" / "train").glob("*.png"):
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert set(np.unique(label)) <= set(range(len(names) + 1))
        assert len(np.unique(label)) > 1


def test_trivial_answers_stay_below_15_giou():
    rng, rows = np.random.default_rng(0), []
    for scene in scenes(60):
        query = make_query(scene, "val", rng)
        record = synthetic.query_record(scene, query, "x.jpg")
        target = scene.objects[query.object_index].union(query.part)
        rows.append(SceneBaselines.from_record(record, (128, 128), "x.json").score(target))
    for name in ("largest_object", "random_part_of_the_right_name"):
        # measured 0.143 over 600 queries; 60 scatter more
        assert np.mean([row[name].iou for row in rows]) < 0.17


def test_generating_again_keeps_the_files_and_other_settings_are_refused(folder):
    before = sorted(p.stat().st_mtime_ns for p in folder.rglob("*.json"))
    synthetic.write_synthreason(folder, train=6, val=4, semantic=3, seed=5)
    assert before == sorted(p.stat().st_mtime_ns for p in folder.rglob("*.json"))
    with pytest.raises(ValueError, match="made with other settings"):
        synthetic.write_synthreason(folder, train=7, val=4, semantic=3, seed=5)


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a SynthReason folder"):
        synthetic.write_synthreason(tmp_path, train=1, val=1, semantic=1)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_two_runs_write_equal_bytes(folder, tmp_path):
    again = synthetic.write_synthreason(tmp_path / "again", train=6, val=4, semantic=3, seed=5)
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes(), path
