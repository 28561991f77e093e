"""LLM-Seg in miniature: pooling, losses, selection, batches with and without targets, saving, and
the scripts end to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import parts
from benchmarks.combine import candidates, with_mask
from cores import chat, train_ds
from cores import merge_lora_weights_and_save_hf_model as merge
from cores.dataset.collate import collate, collate_prompts
from cores.dataset.files.errors import DataError
from cores.dataset.proposals import Proposals, pooling_weights, runs, union
from cores.model import CoresForReasoningSegmentation
from cores.model.config import SelectorConfig
from cores.model.segmenting.frames import preprocess
from cores.model.selecting.selector import Scores, Selector, pool, united
from cores.model.selecting.targets import iop_loss, proposal_targets, similarity_loss
from cores.model.trainable import set_trainable
from cores.utils.precompute import proposals as precompute_proposals
from tests.backbone_toys import flags, toys
from tests.helpers import (
    REALIGNED,
    TEMPLATE,
    conversation,
    gradient_orders,
    randomise,
    rectangle,
    sample,
    tiny_model,
)

SEG = ("SEG",)
SMALL = {
    "features": "sam",
    "heads": 4,
    "mlp_dim": 16,
    "iou_hidden": 16,
    "pool_size": 16,
    "feature_size": 56,
    "proposals": {"points_per_side": 4, "predicted_iou": 0, "stability": 0, "nms": 1},
}


def model_with(proposals: int | None = None, **changes):
    """A model that selects, and its processor; ``proposals`` limits how many an image has."""
    pretrained = changes.pop("features_pretrained", None)
    config = SMALL | changes | ({} if proposals is None else {"count": proposals})
    model, processor = tiny_model(SEG, selector=config, features_pretrained=pretrained)
    randomise(model.selecting, seed=5, scale=0.1)
    processor.proposals = model.proposal_source(None)
    return model, processor


def two_pictures():
    """Rows with 0, 2 and 1 targets; the pictures have other sizes."""
    first = sample(
        conversation(0),
        conversation(2, SEG, question="what is red?", ignore=True),
        name="0",
        seed=1,
    )
    return [first, sample(conversation(1, SEG, (30, 60)), name="1", size=(30, 60), seed=2)]


def few(proposals: Proposals, count: int) -> Proposals:
    return Proposals(proposals.size, proposals.masks[:count], proposals.weights[:count])


# -------------------------------------------------------------------------------------------- parts


def test_pooling_equals_convolution_resizing_and_mean():
    torch.manual_seed(0)
    features, project = torch.randn(2, 5, 4, 4), torch.nn.Conv2d(5, 3, 1)
    weights = torch.rand(2, 6, 16, 16) * (torch.rand(2, 6, 16, 16) < 0.3)
    resized = F.interpolate(project(features), (16, 16), mode="bilinear", align_corners=False)
    expected = torch.einsum("bkpq,bcpq->bkc", weights, resized) / weights.sum((2, 3))[..., None]
    found = F.linear(pool(features, weights), project.weight[..., 0, 0], project.bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # measured: 3e-7
    assert not pool(features, torch.zeros(2, 1, 16, 16)).any()


def test_losses_by_hand():
    present = torch.tensor([[True, True, False], [False, False, False]])
    similarity = torch.tensor([[0.1, 0.0, 9.0], [1.0, 1.0, 1.0]], requires_grad=True)
    iou = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 0.0]])
    # 0.1 / 0.1 apart, both ways
    p, q = torch.tensor([0.0, 1.0]).softmax(0), torch.tensor([1.0, 0.0]).softmax(0)
    loss = similarity_loss(similarity, iou, present, 0.1)
    assert loss.tolist() == pytest.approx([float((p * (p / q).log()).sum()), 0.0])
    loss.sum().backward()
    assert similarity.grad.isfinite().all()
    assert not similarity.grad[0, 2] and not similarity.grad[1].any()
    predicted, truth = torch.tensor([[0.5, 0.0, 7.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    expected = (0.25 + np.exp(-0.5) * 0.25) / 2
    assert iop_loss(predicted, truth, present[:1]).item() == pytest.approx(expected, rel=1e-6)
    assert similarity_loss(iou[:1], iou[:1], present[:1], 0.05).item() == pytest.approx(0, abs=1e-7)


def test_the_similarity_loss_looks_from_the_ground_truth():
    """KL(p ‖ q) of p = 2/3, 1/3 and q = 1/5, 4/5, whose reverse is another number: logits over τ
    are logarithms of the odds."""
    tau, present = 0.5, torch.ones(1, 2, dtype=torch.bool)
    iou = tau * torch.tensor([[2.0, 1.0]]).log()
    similarity = tau * torch.tensor([[1.0, 4.0]]).log()
    p, q = np.array([2 / 3, 1 / 3]), np.array([1 / 5, 4 / 5])
    forward, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    assert abs(forward - reverse) > 0.02
    loss = similarity_loss(similarity, iou, present, tau).item()
    assert loss == pytest.approx(forward, rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("iop", [[0, 1, 1, 0, 0, 0, 0], [0] * 7, [0] * 7]),
        ("similarity", [[1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0] * 7]),
        ("similarity+iop", [[1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0] * 7]),
        ("top5+iop", [[0, 1, 0, 0, 0, 0, 0], [0] * 7, [0] * 7]),
    ],
)
def test_rules(rule, expected):
    present = torch.tensor([[True] * 6 + [False], [True] * 2 + [False] * 5, [False] * 7])
    similarity = torch.tensor(
        [[0.9, 0.8, -0.9, 0.7, 0.6, 0.5, 1.0], [0.1, 0.2, 1, 1, 1, 1, 1], [1.0] * 7]
    )
    iop = torch.tensor(
        [[0.1, 0.6, 0.7, 0.2, 0.2, 0.2, 0.9], [0.2, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9], [0.9] * 7]
    )
    selector = Selector(SelectorConfig(features="sam", rule=rule), 16)
    assert selector.choose(Scores(similarity, iop, present)).int().tolist() == expected


def test_the_chain_is_verified():
    """The last column is the chain's: surest of all, less sure than two, than one of half, and
    alone."""
    present = torch.tensor([[True] * 4, [True] * 4, [True] * 4, [False] * 3 + [True]])
    iop = torch.tensor(
        [[0.6, 0.7, 0.1, 0.8], [0.6, 0.7, 0.1, 0.3], [0.5, 0.1, 0.1, 0.3], [0.9, 0.9, 0.9, 0.0]]
    )
    selector = Selector(SelectorConfig(features="sam", rule="verified", chain=True), 16)
    chosen = selector.choose(Scores(torch.zeros(4, 4), iop, present)).int().tolist()
    assert chosen == [[0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    with pytest.raises(ValueError, match="no chain whose mask it verifies"):
        SelectorConfig(rule="verified")


def test_a_union_returns_to_the_original_frame():
    masks = np.stack([rectangle((10, 20), 0, 0, 5, 5), rectangle((10, 20), 5, 5, 10, 10)])
    proposals = Proposals((10, 20), runs(masks), pooling_weights(runs(masks), (10, 20), 4))
    # the third is padding
    chosen = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    same = united(chosen, proposals, (10, 20))
    assert same.shape == (3, 1, 10, 20)
    assert (same[1, 0].numpy() == masks.any(0)).all() and not same[2].any()
    large = united(chosen, proposals, (30, 60))
    # the corner is rounded
    assert (large[0, 0].numpy() ^ rectangle((30, 60), 0, 0, 15, 15)).sum() <= 1
    assert united(chosen[:0], proposals, (30, 60)).shape == (0, 1, 30, 60)


def test_dinov2_sees_the_same_frame(monkeypatch, dinov2):
    """SAM's normalisation is DINOv2's, and so is its padding with 0: only the size differs."""
    selector = model_with(features="dinov2", features_pretrained=dinov2)[0].selecting
    pixels, _ = preprocess(np.full((30, 60, 3), 200, dtype=np.uint8), 64)
    seen = []
    forward = selector.encoder.forward
    monkeypatch.setattr(
        selector.encoder,
        "forward",
        lambda pixel_values: seen.append(pixel_values[0]) or forward(pixel_values=pixel_values),
    )
    selector.encode(pixels[None])
    expected = (200 / 255 - 0.485) / 0.229
    assert seen[0].shape == (3, 56, 56)
    assert seen[0][0, :25].sub(expected).abs().max() < 1e-4
    assert not seen[0][:, 32:].any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", "clip"),
        ("rule", "best"),
        ("ranking", "size"),
        ("count", 0),
        ("temperature", 0),
        ("proposals", {"nms": 2}),
    ],
)
def test_contradictions_are_refused(field, value):
    with pytest.raises(ValueError, match="nms" if field == "proposals" else field):
        SelectorConfig(**{field: value})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="heads 5 does not divide"):
        tiny_model(SEG, selector=SMALL | {"heads": 5})
    with pytest.raises(ValueError, match="takes one token"):
        tiny_model(("LOC", "SEG"), selector=SMALL)
    with pytest.raises(ValueError, match="--features_pretrained"):
        tiny_model(SEG, selector=SMALL | {"features": "dinov2"})
    model, processor = tiny_model(SEG, selector=dict(SMALL))
    with pytest.raises(ValueError, match="no proposals"):
        model(collate(two_pictures(), processor, SEG, TEMPLATE))


# -------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    "changes", [{}, {"place": True}, {"features": "dinov2"}], ids=["sam", "place", "dinov2"]
)
def test_a_mixed_batch_trains_everything_but_the_encoders(changes, dinov2):
    model, processor = model_with(features_pretrained=dinov2, **changes)
    batch = collate(two_pictures(), processor, SEG, TEMPLATE)
    groups = set_trainable(model, lora=False)
    assert groups.keys() == {"token embeddings", "lm_head", "text projection", "selector"}
    output = model.train()(batch)
    parts = output.losses
    assert parts.keys() == {"text", "similarity", "iop"}
    assert output.loss.item() == pytest.approx(sum(p.item() for p in parts.values()), rel=1e-6)
    output.loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad != (p.grad is not None)]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad.any() for p in model.selecting.iop_head.parameters())


def test_batches_without_targets_or_without_proposals_train_too():
    model, processor = model_with()
    set_trainable(model, lora=False)
    text_only = collate([sample(conversation(0))], processor, SEG, TEMPLATE)
    assert len(text_only.proposals[0]) == 0
    bare = collate(two_pictures(), processor, SEG, TEMPLATE)
    bare.proposals = [few(p, 0) for p in bare.proposals]
    half = collate(two_pictures(), processor, SEG, TEMPLATE)
    half.proposals[0] = few(half.proposals[0], 0)
    orders = []
    for output, order in gradient_orders(model, (text_only, bare, half)):
        orders.append(order)
        assert output.loss.isfinite()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert orders[0] == orders[1] == orders[2]  # see test_model.py: ZeRO's buckets
    found = model.eval().segment(half)
    assert [tuple(f.masks.shape) for f in found] == [(0, 1, 50, 40), (2, 1, 50, 40), (1, 1, 30, 60)]
    assert not found[1].masks.any() and not found[1].iou.any()


def test_company_changes_nothing():
    """A target is scored the same alone and in a batch whose other picture has more proposals."""
    model, processor = model_with()
    batch = collate(two_pictures(), processor, SEG, TEMPLATE)
    batch.proposals[1] = few(batch.proposals[1], 7)
    alone = collate(two_pictures()[1:], processor, SEG, TEMPLATE)
    alone.proposals[0] = batch.proposals[1]
    with torch.no_grad():
        scores = []
        for b in (batch, alone):
            asked = *model.prompt_tokens(model.hidden_states(b), b), b.image_index
            scores.append(model.mask_branch.score(*asked, model.mask_branch.encode_batch(b)))
    assert scores[0].present.sum(1).tolist() == [48, 48, 7]
    for name in ("similarity", "iop"):
        together, single = getattr(scores[0], name)[2, :7], getattr(scores[1], name)[0]
        torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-5)  # measured: 2e-7


def test_masks_are_unions_of_proposals_and_truth_knows_ignored_pixels():
    model, processor = model_with(rule="similarity")
    batch = collate(two_pictures(), processor, SEG, TEMPLATE)
    found = model.segment(batch)
    assert [tuple(f.masks.shape) for f in found] == [(0, 1, 50, 40), (2, 1, 50, 40), (1, 1, 30, 60)]
    proposals = batch.proposals[1]
    known = [union([m], proposals.size) for m in proposals.masks]
    assert any((found[2].masks[0, 0].numpy() == m).all() for m in known)
    heeded, published = (proposal_targets(batch, 48, use_ignore)[0] for use_ignore in (True, False))
    assert heeded.shape == published.shape == (3, 48)
    assert (heeded[:2] != published[:2]).any()


def test_free_answers_bring_their_own_proposals():
    model, processor = model_with()
    prompts = collate_prompts(
        [replace(s, conversations=s.conversations[:1]) for s in two_pictures()],
        processor,
        SEG,
        TEMPLATE,
    )
    assert [len(p) for p in prompts.proposals] == [48, 48]
    answers = model.generate(prompts, processor.tokenizer, max_new_tokens=4)
    for answer, size in zip(answers, prompts.original_sizes, strict=True):
        assert answer.masks.shape[1:] == (1, *size)


@pytest.mark.parametrize(
    "changes", [{"features": "dinov2"}, {"place": True}], ids=["dinov2", "place"]
)
def test_half_precision_scores_alike(changes, dinov2):
    model, processor = model_with(features_pretrained=dinov2, **changes)
    batch = collate(two_pictures(), processor, SEG, TEMPLATE)
    full = model(batch).losses
    half = model.bfloat16()(batch.to(dtype=torch.bfloat16)).losses
    for name, value in full.items():
        # measured: below 0.006
        assert half[name].item() == pytest.approx(value.item(), rel=0.03), name


@pytest.mark.parametrize("features", ["sam", "dinov2"])
def test_saving_keeps_every_mask(tmp_path, features, dinov2):
    model, processor = model_with(
        features=features, features_pretrained=dinov2, rule="similarity+iop"
    )
    model.save_pretrained(tmp_path)
    again = CoresForReasoningSegmentation.from_pretrained(tmp_path).eval()
    batch = collate(two_pictures(), processor, SEG, TEMPLATE)
    for a, b in zip(model.segment(batch), again.segment(batch), strict=True):
        assert torch.equal(a.masks, b.masks), "unions of proposals, which were not read anew"
        torch.testing.assert_close(a.iou, b.iou, **REALIGNED)
    assert again.config.selector == model.config.selector


def test_it_learns_to_tell_two_targets_apart():
    """Two questions about one picture, three proposals: after a few steps each question selects its
    own."""
    model, processor = tiny_model(SEG, selector=SMALL | {"place": True})
    size = (50, 40)
    masks = np.stack(
        [rectangle(size, 0, 0, 20, 20), rectangle(size, 30, 20, 50, 40), np.ones(size, dtype=bool)]
    )
    questions = [
        conversation(1, SEG, size, question=q) for q in ("where is the dog?", "what is red?")
    ]
    asked = sample(
        *(replace(c, masks=masks[i : i + 1]) for i, c in enumerate(questions)), size=size
    )
    batch = collate([asked], processor, SEG, TEMPLATE)
    batch.proposals = [Proposals(size, runs(masks), pooling_weights(runs(masks), size, 16))]
    set_trainable(model, lora=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    for i, found in enumerate(model.eval().segment(batch)):
        assert (found.masks[0, 0].numpy() == masks[i]).all()


# ------------------------------------------------------------------------------------------ scripts


def toy_flags(**changes) -> list[str]:
    selecting = {
        "method": "llm_seg",
        "features": "sam",
        "pool_size": 16,
        "proposals": toys() / "proposals",
        "proposal_points": 4,
        "proposal_iou": 0.0,
        "proposal_stability": 0.0,
        "log_base_dir": toys() / "runs",
        "epochs": 1,
        "val_batch_size": 2,
        "workers": 1,
    }
    return flags(toys(), **(selecting | changes))


def test_the_scripts_end_to_end(tmp_path, capsys):
    shutil.rmtree(toys() / "proposals", ignore_errors=True)
    assert train_ds.main(toy_flags(exp_name="too-early")) == 2
    assert "utils.precompute_proposals" in capsys.readouterr().err
    assert precompute_proposals.main(toy_flags()) == 0
    first = capsys.readouterr().out
    assert "0 there" not in first and "oracle union" in first
    files = {path: path.stat().st_mtime_ns for path in (toys() / "proposals").rglob("*.json")}
    assert 3 < len(files) <= 7  # of four pictures to train and three to evaluate on
    next(iter(files)).unlink()
    assert precompute_proposals.main(toy_flags()) == 0
    assert "1 computed" in capsys.readouterr().out
    assert sum(files[p] != p.stat().st_mtime_ns for p in files) == 1

    assert train_ds.main(toy_flags(exp_name="selecting")) == 0
    run, out = toys() / "runs" / "selecting", tmp_path / "merged"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["baselines"]["oracle_union"]["giou"] >= metrics["teacher_forced"]["giou"] - 1e-9
    assert merge.main(["--run", str(run), "--save_path", str(out)]) == 0
    evaluated = toy_flags(
        exp_name="selecting-again", version=out, proposals="", method="cores", refiner="none"
    )
    # a merged model knows its method; proposals are made on the fly
    assert train_ds.main([*evaluated, "--eval_only"]) == 0
    again = json.loads((toys() / "runs" / "selecting-again" / "metrics.json").read_text())
    assert again["teacher_forced"] == metrics["teacher_forced"] and again["free"] == metrics["free"]
    assert train_ds.main(toy_flags(exp_name="mismatch", version=out, method="lisa")) == 2
    assert "is an LLM-Seg" in capsys.readouterr().err

    image = next((toys() / "data" / "reason_seg" / "Toy" / "val").glob("*.jpg"))
    asked = ["--version", str(out), "--image", str(image), "--prompt", "the bright thing", "--json"]
    assert (
        chat.main(
            [
                *asked,
                "--vis_save_path",
                str(tmp_path / "vis"),
                "--proposals",
                str(tmp_path / "store"),
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["image"] == str(image)
    assert len(list((tmp_path / "store").rglob("*.json"))) == 1


def test_precompute_refuses_what_it_cannot_do(capsys):
    cases = [
        (toy_flags(method="lisa"), "only llm_seg"),
        (toy_flags(proposals=""), "--proposals is unset"),
        ([*toy_flags(), "--jobs", "0"], "--jobs is 0"),
        (toy_flags(vision_pretrained="absent"), "no such SAM"),
    ]
    for argv, words in cases:
        assert precompute_proposals.main(argv) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(tmp_path):
    for jobs in ("1", "2"):
        assert (
            precompute_proposals.main([*toy_flags(proposals=tmp_path / jobs), "--jobs", jobs]) == 0
        )
    one, two = (
        {p.relative_to(tmp_path / jobs): p.read_text() for p in (tmp_path / jobs).rglob("*.json")}
        for jobs in "12"
    )
    assert one == two


@pytest.mark.chaos
def test_a_killed_command_leaves_whole_files_and_no_process(tmp_path):
    argv = [*toy_flags(proposals=tmp_path, steps_per_epoch=2000, proposal_points=16), "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cores.utils.precompute_proposals", *argv], start_new_session=True
    )
    try:
        wait_until(lambda: any(tmp_path.rglob("*.json")))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not alive(process.pid))
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    for path in tmp_path.rglob("*.json"):
        assert json.loads(path.read_text())["size"] == [24, 32]


def alive(group: int) -> bool:
    """Whether a process group has a member."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, limit: float = 120.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_the_chain_among_the_proposals():
    """The target is the left half; the mask of the chain is right, the only proposal is the right
    half."""
    size = (8, 8)
    target, other = rectangle(size, 0, 0, 8, 4), rectangle(size, 0, 4, 8, 8)
    proposals = Proposals(size, runs(other[None]), pooling_weights(runs(other[None]), size, 4))
    present = torch.tensor([True, True])

    def found(similarity, iop):
        scores = torch.tensor(similarity), torch.tensor(iop), present
        alone = Scores(*(x[:1] for x in scores))
        masks = candidates(target, proposals, alone, Scores(*scores), target)
        return {name: int((mask == target).all()) for name, mask in masks.items()}

    cores = {"cores": 1, "iop": 0, "similarity": 0, "better": 1}
    trusted = {"among, similarity": 1, "among, iop": 1, "verified": 1, "either": 1}
    assert found([0.1, 0.9], [0.2, 0.8]) == cores | trusted
    assert found([0.9, 0.1], [0.8, 0.2]) == cores | dict.fromkeys(trusted, 0)
    with pytest.raises(ValueError, match="use smaller images"):
        with_mask(proposals, np.ones((9, 9), dtype=bool))


def test_the_benchmark_of_the_store_reads_what_it_wrote(tmp_path):
    measured = parts.store(3, tmp_path)
    assert measured["images"] == len(list(tmp_path.rglob("*.json"))) == 3
    assert 0 < measured["open_ms_median"] <= measured["open_ms_p99"]


def test_a_worker_without_a_store_says_what_to_do():
    model, processor = model_with()
    processor.proposals = model.proposal_source(None, generate=False)
    with pytest.raises(DataError, match="utils.precompute_proposals"):
        collate(two_pictures(), processor, SEG, TEMPLATE)
