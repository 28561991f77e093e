"""LLM-Seg wherever a finished model is asked: sessions, chat, the page, free evaluation, export; on
a model of fixed answers."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cores import app, chat
from cores import merge_lora_weights_and_save_hf_model as merge
from cores.dataset.proposals import union
from cores.model import CoresForReasoningSegmentation, ReasoningSegmenter
from cores.utils import build
from cores.utils.evaluation import cli as evaluation_cli
from cores.utils.settings.arguments import parse
from cores.utils.settings.flags import UsageError
from tests.backbone_toys import toys
from tests.helpers import tiny_model
from tests.scripted import SELECTOR, scripted_model

ANSWER = "It is [SEG]"


@pytest.fixture
def segmenter() -> ReasoningSegmenter:
    return ReasoningSegmenter.from_pretrained(scripted_model(selecting=True), max_new_tokens=12)


@pytest.fixture
def calls(segmenter, monkeypatch) -> dict[str, int]:
    """How often DINOv2, SAM's encoder for masks, and the finder of proposals have run."""
    counts = {"dinov2": 0, "sam": 0, "proposals": 0}

    def count(name, function):
        def wrapped(*args):
            counts[name] += 1
            return function(*args)

        return wrapped

    model, source = segmenter.model, segmenter.processor.proposals
    monkeypatch.setattr(model.selecting, "encode", count("dinov2", model.selecting.encode))
    monkeypatch.setattr(model.segmenting, "encode", count("sam", model.segmenting.encode))
    monkeypatch.setattr(source, "generate", count("proposals", source.generate))
    return counts


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (50, 40, 3), dtype=np.uint8)


def test_a_conversation_looks_at_its_picture_once(segmenter, calls):
    session = segmenter.open(picture())
    once = {"dinov2": 1, "sam": 0, "proposals": 1}
    assert calls == once, "opening reads ahead"
    first, second = session.ask("where is the dog?"), session.ask("and the red?")
    assert calls == once
    assert [r.text for r in (first, second)] == [ANSWER, ANSWER]
    assert [question for question, _ in session.turns] == ["where is the dog?", "and the red?"]
    alone = segmenter(picture(), "where is the dog?")
    assert np.array_equal(alone.masks[0].mask, first.masks[0].mask)
    found = segmenter.processor.proposals(picture(), "picture")
    assert any(np.array_equal(first.masks[0].mask, union([m], found.size)) for m in found.masks), (
        "one of the proposals"
    )
    assert list(first.masks[0].levels) == ["SEG"] and not first.masks[0].coarse


def test_answers_with_no_one_and_several_masks(segmenter, calls):
    questions = ["hello?", "where is the dog?", "the wheel"]
    found = segmenter(picture(), questions)
    assert calls == {"dinov2": 1, "sam": 0, "proposals": 1}
    assert [len(r.masks) for r in found] == [0, 1, 4]
    for question, together in zip(questions, found, strict=True):
        alone = segmenter(picture(), question)
        assert alone.text == together.text
        assert all(
            np.array_equal(a.mask, b.mask) for a, b in zip(alone.masks, together.masks, strict=True)
        )
    assert calls["dinov2"] == 3, "not for the one without a mask"


def test_chat_keeps_proposals(tmp_path, capsys, monkeypatch):
    image, store = tmp_path / "a.png", tmp_path / "store"
    Image.fromarray(picture()).save(image)
    model = str(scripted_model(selecting=True))
    argv = [
        "--version",
        model,
        "--image",
        str(image),
        "--prompt",
        "where?",
        "--json",
        "--vis_save_path",
        str(tmp_path / "vis"),
    ]
    argv += ["--proposals", str(store)]
    reports = []
    for _ in range(2):
        assert chat.main(argv) == 0
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        (file,) = store.rglob("*.json")
        monkeypatch.setattr(
            "cores.model.selecting.proposals.make_generator", None
        )  # the second time it is read
    assert reports[0]["text"] == ANSWER and list(reports[0]["masks"][0]["files"]) == ["SEG"]
    assert reports[0]["masks"][0]["rle"] == reports[1]["masks"][0]["rle"]
    whole = file.read_bytes()
    file.write_text("{")
    monkeypatch.undo()
    assert chat.main(argv) == 0
    assert file.read_bytes() == whole, "what is damaged is computed again"


def test_the_page_shows_the_selected_mask(segmenter):
    result = segmenter(picture(), "where?")
    shown = str(app.steps(result, 0.5))
    assert shown.count("<img") == 2 and "1. [SEG] the answer" in shown
    assert (app.paint(result, app.ANSWER, 0.5, 50) != app.paint(result, app.PICTURE, 0.5, 50)).any()


def test_the_layout_of_lisa_has_no_place_for_it(tmp_path, capsys):
    argv = [
        "--merged",
        str(scripted_model(selecting=True)),
        "--layout",
        "lisa",
        "--save_path",
        str(tmp_path / "lisa"),
    ]
    assert merge.main(argv) == 2
    assert "no place for a selector" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert merge.main([*argv[:2], *argv[4:]]) == 0
    ours, theirs = (
        ReasoningSegmenter.from_pretrained(p)(picture(), "where?")
        for p in (argv[1], tmp_path / "lisa")
    )
    assert np.array_equal(ours.masks[0].mask, theirs.masks[0].mask)


def test_free_evaluation_with_its_ceiling(tmp_path):
    data = toys() / "data"
    argv = [
        str(scripted_model(selecting=True)),
        "--dataset_dir",
        str(data),
        "--val_dataset",
        "Toy|val",
        "--max_new_tokens",
        "8",
    ]
    argv += ["--proposals", str(tmp_path / "store"), "--val_batch_size", "2"]
    metrics = {}
    for rule in ("similarity", "similarity+iop"):
        assert evaluation_cli.main([*argv, "--select", rule, "--out", str(tmp_path / rule)]) == 0
        metrics[rule] = json.loads((tmp_path / rule / "metrics.json").read_text())
    assert len(list((tmp_path / "store").rglob("*.json"))) == 3
    found = metrics["similarity"]
    assert found["free"]["emission_rate"] == 1
    assert found["baselines"]["oracle_best_proposal"]["giou"] >= found["free"]["giou"] - 1e-9
    assert metrics["similarity+iop"]["free"]["giou"] != found["free"]["giou"]
    assert "oracle union" in (tmp_path / "similarity" / "report.html").read_text()


def test_a_cache_of_what_is_never_looked_at_is_refused(tmp_path):
    argv = [
        "--eval_only",
        "--version",
        str(scripted_model(selecting=True)),
        "--precision",
        "fp32",
        "--sam_cache",
        str(tmp_path),
    ]
    with pytest.raises(UsageError, match="looks at DINOv2's features"):
        build.build_model(parse(argv))


def test_a_model_saved_before_there_were_selectors_loads_unchanged(tmp_path):
    shutil.copytree(scripted_model(), tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert config.pop("selector") is None
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    old, new = (
        CoresForReasoningSegmentation.from_pretrained(p).state_dict()
        for p in (tmp_path / "old", scripted_model())
    )
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_a_segmenter_of_a_new_model_finds_its_own_proposals():
    model, processor = tiny_model(
        ("SEG",),
        selector={k: v for k, v in SELECTOR.items() if k != "dinov2"} | {"features": "sam"},
    )
    assert processor.proposals is None
    assert len(ReasoningSegmenter(model, processor).open(picture())._images.proposals[0]) > 0
