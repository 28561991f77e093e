"""cores+select in miniature: the chain's mask among the proposals, what trains, the frozen decoder,
and the scripts end to end."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import combine
from cores import app, chat, train_ds
from cores import merge_lora_weights_and_save_hf_model as merge
from cores.dataset.collate import collate, collate_prompts
from cores.dataset.proposals import Proposals, overlaps, pooling_weights, runs
from cores.model import CoresForReasoningSegmentation, ReasoningSegmenter
from cores.model.checkpoints.sam import load_sam
from cores.model.config import SelectorConfig
from cores.model.masks import MaskBranch, Segmentation
from cores.model.segmenting.frames import to_grid
from cores.model.selecting.selector import Selector, pool, pool_per_target
from cores.model.selecting.targets import overlap
from cores.model.trainable import set_trainable
from cores.utils.evaluation import cli as evaluation_cli
from cores.utils.precompute import proposals as precompute_proposals
from tests.backbone_toys import toys
from tests.helpers import (
    LEVELS,
    REALIGNED,
    TEMPLATE,
    backbones,
    conversation,
    gradient_orders,
    randomise,
    rectangle,
    sample,
    tiny_model,
)
from tests.model.selecting.test_llm_seg import SMALL, few, toy_flags
from tests.scripted import scripted_model

CHAIN = SMALL | {"chain": True, "rule": "similarity"}


def model_with(levels=LEVELS, features_pretrained=None, selector=None, **config):
    """A CoReS that selects, and its processor."""
    selector = CHAIN | (selector or {})
    model, processor = tiny_model(
        levels, selector=selector, features_pretrained=features_pretrained, **config
    )
    randomise(model.selecting, seed=5, scale=0.1)
    processor.proposals = model.proposal_source(None)
    return model, processor


def pictures(levels=LEVELS):
    """Rows with 0, 2 and 1 targets; the pictures have other sizes."""
    first = sample(
        conversation(0),
        conversation(2, levels, question="what is red?", ignore=True),
        name="0",
        seed=1,
    )
    return [first, sample(conversation(1, levels, (30, 60)), name="1", size=(30, 60), seed=2)]


# -------------------------------------------------------------------------------------------- parts


def test_overlaps_of_masks_are_those_of_run_lengths():
    masks = np.stack(
        [rectangle((9, 7), 0, 0, 5, 5), rectangle((9, 7), 4, 2, 9, 7), np.zeros((9, 7), dtype=bool)]
    )
    targets = np.stack([rectangle((9, 7), 2, 1, 8, 6)] * 3)
    ignore = rectangle((9, 7), 0, 0, 4, 7)
    for hidden in (None, ignore):
        found = overlap(
            torch.from_numpy(masks),
            torch.from_numpy(targets),
            None if hidden is None else torch.from_numpy(hidden),
        )
        for ours, theirs in zip(found, overlaps(runs(masks), targets, hidden), strict=True):
            assert ours.tolist() == pytest.approx(theirs.diagonal().tolist())
    assert overlap(torch.zeros(0, 9, 7).bool(), torch.zeros(0, 9, 7).bool())[0].shape == (0,)


@pytest.mark.parametrize("place", [False, True])
def test_one_more_proposal_is_scored_like_any_other(place):
    """A target's own mask gets the scores that it would have among the proposals of its image;
    targets have different ones."""
    torch.manual_seed(0)
    size, side = (24, 32), 16
    selector = Selector(SelectorConfig(**SMALL | {"place": place}), 32).eval()
    masks = np.stack([rectangle(size, 2 * i, i, 12 + i, 20 + 2 * i) for i in range(4)])
    proposals = Proposals(size, runs(masks), pooling_weights(runs(masks), size, side))
    text, features, position = (
        torch.randn(2, 32),
        torch.randn(1, 32, 4, 4),
        torch.randn(1, 32, 4, 4),
    )
    image = torch.zeros(2, dtype=torch.int64)
    given = [few(proposals, 2)], image, position, proposals.weights[2:]
    found = selector(text, features, *given)
    assert found.present.tolist() == [[True] * 3] * 2
    for target in range(2):
        kept = [0, 1, 2 + target]
        among = Proposals(size, [proposals.masks[i] for i in kept], proposals.weights[kept])
        alone = selector(text[target : target + 1], features, [among], image[:1], position)
        torch.testing.assert_close(
            found.similarity[target], alone.similarity[0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(found.iop[target], alone.iop[0], atol=1e-5, rtol=1e-5)


def test_the_own_mask_is_pooled_in_the_frame_of_the_proposals():
    mask = rectangle((32, 64), 4, 8, 20, 40)
    ours = to_grid(torch.from_numpy(mask[None]), (32, 64), 64, 16)
    torch.testing.assert_close(ours, pooling_weights(runs(mask[None]), (32, 64), 16))


class Largest(TorchDispatchMode):
    """``numel``: values of the largest tensor that was made meanwhile, views left out."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not function.is_view:
            self.numel = max(self.numel, found.numel())
        return found


def test_masks_and_features_of_many_targets_are_not_made_at_once():
    count, size = 20, (64, 48)
    masks, targets = (torch.rand(count, *size) > 0.5 for _ in range(2))
    ignore, image = torch.rand(size) > 0.9, torch.arange(count) % 2
    features, weights = torch.randn(2, 24, 4, 4), torch.rand(count, 8, 8)
    for run, limit in (
        (lambda: overlap(masks, targets, ignore), masks[0].numel()),
        (lambda: to_grid(masks, size, 64, 4), 64 * 64),
        (lambda: pool_per_target(features, weights, image), max(features.numel(), weights.numel())),
    ):
        with Largest() as largest:
            run()
        assert 0 < largest.numel <= limit
    together = pool(features[image], weights[:, None])[:, 0]
    torch.testing.assert_close(pool_per_target(features, weights, image), together)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="without a chain takes one token"):
        tiny_model(LEVELS, selector=SMALL)
    with pytest.raises(ValueError, match="without a chain takes one token"):
        tiny_model(LEVELS, selector=CHAIN | {"chain": False})
    model, processor = tiny_model(LEVELS, selector=CHAIN)
    with pytest.raises(ValueError, match="no proposals"):
        model(collate(pictures(), processor, LEVELS, TEMPLATE))


# -------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("case", ["sam", "dinov2", "lisa"])
def test_a_mixed_batch_trains_both_branches(case, dinov2):
    levels = ("SEG",) if case == "lisa" else LEVELS
    selector = {"features": "dinov2"} if case == "dinov2" else {}
    model, processor = model_with(
        levels, dinov2 if case == "dinov2" else None, selector, pointing_weight=0.5
    )
    batch = collate(pictures(levels), processor, levels, TEMPLATE)
    groups = set_trainable(model, lora=False)
    assert {"mask decoder", "selector", "text projection"} < groups.keys() and (
        "refiner" in groups
    ) == (case != "lisa")
    output = model.train()(batch)
    p = {name: value.item() for name, value in output.losses.items()}
    assert p.keys() == {"text", "bce", "dice", "pointing", "similarity", "iop"}
    expected = (
        p["text"]
        + 2 * p["bce"]
        + 0.5 * p["dice"]
        + p["similarity"]
        + p["iop"]
        + 0.5 * p["pointing"]
    )
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert [tuple(m.shape) for m in output.low_res] == [(n, len(levels), 16, 16) for n in (0, 2, 1)]
    output.loss.backward()
    assert not [n for n, w in model.named_parameters() if w.requires_grad != (w.grad is not None)]
    assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)
    trained = [name for name, w in model.named_parameters() if w.requires_grad]
    assert not [name for name in trained if "untrained" in name or "encoder" in name]


@torch.no_grad()
def chain_alone(model, batch) -> list[Segmentation]:
    """What the chain of segmenting makes, before anything is selected."""
    prompts, counts = model.prompt_tokens(model.hidden_states(batch), batch)
    branch = MaskBranch(model.config, model.segmenting, selecting=None)
    return branch.segment(prompts, counts, batch.image_index, model.mask_branch.encode_batch(batch))


def test_the_chains_mask_is_judged_by_its_target(monkeypatch):
    """What is learnt of the last column is the truth of the chain's mask, and no gradient goes from
    there into the chain."""
    model, processor = model_with()
    set_trainable(model, lora=False)
    batch = collate(pictures(), processor, LEVELS, TEMPLATE)
    truth = {}
    losses = model.selecting.losses
    monkeypatch.setattr(
        model.selecting,
        "losses",
        lambda s, iou, iop: truth.update(iou=iou, iop=iop) or losses(s, iou, iop),
    )
    parts = model(batch).losses
    chain = chain_alone(model, batch)
    own = [
        overlap(f.masks[:, -1], t, i)
        for f, t, i in zip(chain, batch.target_masks, batch.ignore_masks, strict=True)
    ]
    assert truth["iou"][:, -1].tolist() == pytest.approx(
        torch.cat([iou for iou, _ in own]).tolist()
    )
    assert truth["iop"][:, -1].tolist() == pytest.approx(
        torch.cat([iop for _, iop in own]).tolist()
    )
    assert truth["iop"].shape[1] == 49 and truth["iop"][:, -1].any()
    (parts["similarity"] + parts["iop"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.segmenting.parameters())


@pytest.mark.parametrize("pointing", [0.0, 0.5])
def test_batches_without_targets_or_without_proposals_train_too(pointing):
    model, processor = model_with(pointing_weight=pointing)
    set_trainable(model, lora=False)
    text_only = collate([sample(conversation(0))], processor, LEVELS, TEMPLATE)
    bare = collate(pictures(), processor, LEVELS, TEMPLATE)
    bare.proposals = [few(p, 0) for p in bare.proposals]
    half = collate(pictures(), processor, LEVELS, TEMPLATE)
    half.proposals[0] = few(half.proposals[0], 0)
    orders = []
    for output, order in gradient_orders(model, (text_only, bare, half)):
        orders.append(order)
        assert output.loss.isfinite()
    assert len(orders[0]) == sum(p.requires_grad for p in model.parameters())
    assert orders[0] == orders[1] == orders[2]  # see test_model.py: ZeRO's buckets
    with torch.no_grad():
        assert model(text_only).losses["similarity"].item() == 0
    batch, model = bare, model.eval()
    chain = chain_alone(model, batch)
    for alone, found in zip(chain, model.segment(batch), strict=True):
        assert torch.equal(alone.masks, found.masks), "the only proposal is the most similar"


def test_the_rule_decides_between_chain_and_proposals(monkeypatch):
    model, processor = model_with()
    batch = collate(pictures(), processor, LEVELS, TEMPLATE)
    chain = chain_alone(model, batch)
    for own in (True, False):

        def choose(scores, own=own):
            chosen = torch.zeros_like(scores.present)
            chosen[:, -1 if own else 0] = True
            return chosen

        monkeypatch.setattr(model.selecting, "choose", choose)
        for alone, found, count in zip(chain, model.segment(batch), (0, 2, 1), strict=True):
            assert found.masks.shape == alone.masks.shape and len(found.masks) == count
            assert torch.equal(found.masks[:, 0], alone.masks[:, 0]) and torch.equal(
                found.iou[:, 0], alone.iou[:, 0]
            )
            if count:
                assert torch.equal(found.masks[:, 1], alone.masks[:, 1]) == own


def test_free_answers():
    model, processor = model_with()
    prompts = collate_prompts(
        [replace(s, conversations=s.conversations[:1]) for s in pictures()],
        processor,
        LEVELS,
        TEMPLATE,
    )
    for answer, size in zip(
        model.generate(prompts, processor.tokenizer, max_new_tokens=4),
        prompts.original_sizes,
        strict=True,
    ):
        assert answer.masks.shape[1:] == (2, *size)


def test_proposals_come_from_the_decoder_before_training(tmp_path, dinov2):
    """Whatever happens to the trained decoder, store and proposals stay those of the SAM it started
    from, saved or not."""
    model, processor = model_with(features_pretrained=dinov2, selector={"features": "dinov2"})
    alone, _ = tiny_model(("SEG",), selector=SMALL)
    stores = [m.proposal_source(tmp_path).store.folder for m in (model, alone)]
    assert stores[0] == stores[1]
    image = pictures()[0].image
    before = processor.proposals(image, "a").masks
    randomise(model.segmenting.sam.mask_decoder, seed=9, scale=0.3)
    assert model.proposal_source(None)(image, "a").masks == before
    model.save_pretrained(tmp_path / "model")
    again = CoresForReasoningSegmentation.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16
    ).eval()
    assert again.proposal_source(tmp_path).store.folder == stores[0]
    again.float()
    sam = load_sam(backbones()[1])[0].mask_decoder.state_dict()
    assert all(
        torch.equal(w.bfloat16(), again.segmenting.untrained.state_dict()[name].bfloat16())
        for name, w in sam.items()
    )
    again = CoresForReasoningSegmentation.from_pretrained(tmp_path / "model").eval()
    batch = collate(pictures(), processor, LEVELS, TEMPLATE)
    for a, b in zip(model.segment(batch), again.segment(batch), strict=True):
        assert (a.masks != b.masks).sum() <= 1, (
            "a pixel at the threshold may fall on its other side"
        )
        torch.testing.assert_close(a.iou, b.iou, **REALIGNED)


def test_half_precision_answers(dinov2):
    model, processor = model_with(features_pretrained=dinov2, selector={"features": "dinov2"})
    batch = collate(pictures(), processor, LEVELS, TEMPLATE)
    full = model(batch).losses
    half = model.bfloat16()(batch.to(dtype=torch.bfloat16)).losses
    for name, value in full.items():
        assert half[name].item() == pytest.approx(value.item(), rel=0.1, abs=0.02), name


# ------------------------------------------------------------------------------------------ scripts


def flags(**changes) -> list[str]:
    chain = {"method": "cores+select", "proposals": toys() / "proposals-chain", "levels": "LOC,SEG"}
    return toy_flags(**(chain | changes))


def test_the_scripts_end_to_end(tmp_path, capsys):
    shutil.rmtree(toys() / "proposals-chain", ignore_errors=True)
    assert precompute_proposals.main(flags()) == 0
    stored = len(list((toys() / "proposals-chain").rglob("*.json")))
    assert train_ds.main(flags(exp_name="chain", sam_cache=tmp_path / "cache")) == 0
    run, out = toys() / "runs" / "chain", tmp_path / "merged"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["teacher_forced"]["n"] == 3 and "first_iou" in metrics["teacher_forced"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"bce", "dice", "similarity", "iop"} < log[0].keys()
    assert train_ds.main(["--resume", str(run), "--eval_only", "--sam_cache", ""]) == 0
    resumed = json.loads((run / "metrics.json").read_text())
    assert (
        resumed["teacher_forced"] == metrics["teacher_forced"]
        and resumed["free"] == metrics["free"]
    )
    both = combine.joint(run)
    assert both["among, similarity"]["giou"] == pytest.approx(metrics["teacher_forced"]["giou"])
    assert both["better"]["giou"] >= max(both[row]["giou"] for row in ("cores", "iop"))
    assert train_ds.main(flags(exp_name="chain", epochs=2)) == 2, "another schedule"
    assert "epochs was 1" in capsys.readouterr().err

    assert merge.main(["--run", str(run), "--save_path", str(out)]) == 0
    evaluated = flags(exp_name="chain-again", version=out, proposals="", method="cores")
    # a merged model knows its method; proposals are made on the fly
    assert train_ds.main([*evaluated, "--eval_only"]) == 0
    again = json.loads((toys() / "runs" / "chain-again" / "metrics.json").read_text())
    assert again["teacher_forced"] == metrics["teacher_forced"] and again["free"] == metrics["free"]
    capsys.readouterr()
    for version, method, words in (
        (out, "cores", "a CoReS with a selector"),
        (scripted_model(), "cores+select", "a CoReS or LISA"),
    ):
        assert train_ds.main(flags(exp_name="mismatch", version=version, method=method)) == 2
        assert f"is {words}, --method says {method}" in capsys.readouterr().err
    assert train_ds.main(flags(exp_name="on", version=out, steps_per_epoch=1, no_eval=True)) == 0, (
        "training goes on from it"
    )
    assert len(list((toys() / "proposals-chain").rglob("*.json"))) == stored, (
        "its proposals are those of the first SAM"
    )


ANSWER = "It is [LOC] on [SEG]"


@pytest.fixture
def segmenter() -> ReasoningSegmenter:
    return ReasoningSegmenter.from_pretrained(
        scripted_model(selecting=True, chain=True), max_new_tokens=12
    )


def test_a_conversation_looks_at_its_picture_once(segmenter, monkeypatch):
    image, calls = pictures()[0].image, []
    model, source = segmenter.model, segmenter.processor.proposals
    for owner, name in (
        (model.selecting, "encode"),
        (model.segmenting, "encode"),
        (source, "generate"),
    ):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, real=real, name=name: calls.append(name) or real(*args)
        )
    session = segmenter.open(image)
    assert sorted(calls) == ["encode", "encode", "generate"], "opening reads ahead"
    results = session.ask("where is the dog?"), session.ask("hello?"), session.ask("and the red?")
    assert len(calls) == 3
    assert [r.text for r in results] == [ANSWER, "there", "there"] and [
        len(r.masks) for r in results
    ] == [1, 0, 0]
    found = results[0].masks[0]
    assert list(found.levels) == ["LOC", "SEG"] and list(found.coarse) == ["LOC"]
    alone = segmenter(image, "where is the dog?").masks[0]
    assert (
        all(np.array_equal(found.levels[name], alone.levels[name]) for name in LEVELS)
        and found.ious == alone.ious
    )
    assert str(app.steps(results[0], 0.5)).count("<img") == 3


def test_chat_and_export(tmp_path, capsys):
    image, model = tmp_path / "a.png", scripted_model(selecting=True, chain=True)
    Image.fromarray(pictures()[0].image).save(image)
    argv = [
        "--version",
        str(model),
        "--image",
        str(image),
        "--prompt",
        "where?",
        "--json",
        "--vis_save_path",
        str(tmp_path / "vis"),
    ]
    assert chat.main([*argv, "--proposals", str(tmp_path / "store")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["text"] == ANSWER and list(found["masks"][0]["files"]) == ["LOC", "SEG"]
    assert len(list((tmp_path / "store").rglob("*.json"))) == 1
    assert (
        merge.main(
            ["--merged", str(model), "--layout", "lisa", "--save_path", str(tmp_path / "lisa")]
        )
        == 2
    )
    assert "no place for a selector, which this model has; keep" in capsys.readouterr().err


def test_evaluation_by_three_rules(tmp_path, capsys):
    argv = [
        str(scripted_model(selecting=True, chain=True)),
        "--dataset_dir",
        str(toys() / "data"),
        "--val_dataset",
        "Toy|val",
    ]
    argv += [
        "--max_new_tokens",
        "8",
        "--proposals",
        str(tmp_path / "store"),
        "--val_batch_size",
        "2",
    ]
    found = {}
    for rule in ("similarity", "iop", "verified"):
        assert evaluation_cli.main([*argv, "--select", rule, "--out", str(tmp_path / rule)]) == 0
        found[rule] = json.loads((tmp_path / rule / "metrics.json").read_text())["free"]
    assert found["similarity"]["emission_rate"] == 1
    assert found["similarity"]["giou"] != found["iop"]["giou"]
    assert len({rule["first_iou"] for rule in found.values()}) == 1, (
        "the chain's first mask is not chosen"
    )
    alone = ["--select", "verified", "--out", str(tmp_path / "alone")]
    assert evaluation_cli.main([str(scripted_model(selecting=True)), *argv[1:], *alone]) == 2
    assert "no chain whose mask it verifies" in capsys.readouterr().err
