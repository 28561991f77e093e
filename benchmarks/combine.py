"""CoReS's final mask as one more proposal, among which a trained LLM-Seg selects.

    python -m benchmarks.combine --llm_seg runs/synthreason/llm_seg-0 \\
        --cores runs/synthreason/cores-0 --json FILE
    python -m benchmarks.combine --joint runs/synthreason/cores+select-0 --json FILE

Two models answer teacher-forced (the runs of ``python -m benchmarks.synthreason``), or both
branches of one that was trained with ``--method cores+select``. Rows of the result, where "among"
means that CoReS's mask stands among the proposals:

cores, iop, similarity  each model (branch) alone, LLM-Seg by two of its rules
among, similarity       whatever is most similar to [SEG]
among, iop              the union of everything with IoP > 0.5
verified                CoReS's mask if its IoP is at least that of every proposal, else LLM-Seg's
                        choice by IoP
either                  the union of CoReS's mask and LLM-Seg's choice by IoP
better                  the better of CoReS's mask and LLM-Seg's choice, by its IoU with the target
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.shared import benchmark_parser, write_json
from cores.dataset.collate import Batch, collate
from cores.dataset.conversation.turns import Conversation
from cores.dataset.mixture import EvalDataset
from cores.dataset.proposals import Proposals, pooling_weights, runs, union
from cores.dataset.sample import Sample
from cores.model.masks import MaskBranch
from cores.model.selecting.selector import Scores
from cores.utils.build import build_eval, build_trained
from cores.utils.metrics import ciou, giou, intersection_and_union, iou


def with_mask(proposals: Proposals, mask: np.ndarray) -> Proposals:
    """One more proposal, the last; bool (H, W) in the proposals' frame. Raises ValueError for
    another frame."""
    if mask.shape != tuple(proposals.size):
        raise ValueError(
            f"the mask is of {mask.shape}, the proposals are of {proposals.size}; use smaller"
            " images"
        )
    extra, side = runs(mask[None]), proposals.weights.shape[-1]
    weights = torch.cat([proposals.weights, pooling_weights(extra, proposals.size, side)])
    return Proposals(proposals.size, proposals.masks + extra, weights)


def pick(proposals: Proposals, chosen: np.ndarray) -> np.ndarray:
    """bool (K,) -> the union, bool (h, w)."""
    return union(
        [m for m, keep in zip(proposals.masks, chosen, strict=True) if keep], proposals.size
    )


def candidates(
    mask: np.ndarray, proposals: Proposals, alone: Scores, among: Scores, target: np.ndarray
) -> dict[str, np.ndarray]:
    """Row of the table -> mask, see above. ``among`` has one column more than ``alone``; both are
    of this one target."""
    count, everything = len(proposals), with_mask(proposals, mask)
    best = np.arange(count) == (int(alone.similarity.argmax()) if count else -1)
    selected = pick(proposals, alone.iop.numpy()[:count] > 0.5)
    iops = among.iop.numpy()
    found = {
        "cores": mask,
        "iop": selected,
        "similarity": pick(proposals, best),
        "among, similarity": pick(
            everything, np.arange(count + 1) == int(among.similarity.argmax())
        ),
        "among, iop": pick(everything, iops > 0.5),
        "verified": (
            mask if not selected.any() or iops[count] >= iops[:count].max(initial=0) else selected
        ),
        "either": mask | selected,
    }
    better = max((mask, selected), key=lambda m: float(iou(*intersection_and_union(m, target))))
    return found | {"better": better}


class Selecting:
    """A trained LLM-Seg that scores its proposals, and whatever mask stands among them."""

    def __init__(self, run: Path):
        self.model, self.processor, self.settings = build_trained(run)
        self.processor.proposals = self.model.proposal_source(self.settings.proposals or None)

    def batch(self, sample: Sample, conversation: Conversation) -> Batch:
        alone = dataclasses.replace(sample, conversations=[conversation])
        return collate([alone], self.processor, self.processor.levels, self.processor.conversation)

    def score(self, batch: Batch, proposals: Proposals, target: int) -> Scores:
        """Of one target of the only conversation in ``batch``."""
        scored = dataclasses.replace(batch, proposals=[proposals])
        asked = (
            *self.model.prompt_tokens(self.model.hidden_states(scored), scored),
            scored.image_index,
        )
        images = self.model.mask_branch.encode_batch(scored)
        return of_one(self.model.mask_branch.score(*asked, images), target)


def of_one(scores: Scores, target: int) -> Scores:
    """The scores of one target, without the columns that pad its image's proposals."""
    there = scores.present[target]
    return Scores(*(getattr(scores, f.name)[target][there] for f in dataclasses.fields(Scores)))


@torch.no_grad()
def combine(cores_run: Path, llm_seg_run: Path) -> dict[str, dict[str, float]]:
    """Row -> {giou, ciou, n}, fractions, on the evaluation set of the CoReS run."""
    chain, processor, settings = build_trained(cores_run)
    selecting = Selecting(llm_seg_run)
    data = build_eval(settings, processor)
    same = EvalDataset(
        settings.dataset_dir,
        settings.val_dataset,
        selecting.processor.levels,
        selecting.processor.exemplar_count,
    )
    scores: dict[str, list[tuple[int, int]]] = {}
    for index in tqdm(range(len(data)), unit="image"):
        answers = chain.segment(
            collate([data[index]], processor, processor.levels, processor.conversation)
        )
        sample = same[index]
        for conversation, answer in zip(sample.conversations, answers, strict=True):
            batch = selecting.batch(sample, conversation)
            proposals = batch.proposals[0]
            for k, target in enumerate(conversation.masks):
                mask = answer.masks[k, -1].numpy()
                alone, among = (
                    selecting.score(batch, p, k) for p in (proposals, with_mask(proposals, mask))
                )
                for name, found in candidates(mask, proposals, alone, among, target).items():
                    scores.setdefault(name, []).append(
                        intersection_and_union(found, target, conversation.ignore)
                    )
    return summary(scores)


@torch.no_grad()
def joint(run: Path) -> dict[str, dict[str, float]]:
    """As ``combine``, of one model with both branches, on its own evaluation set."""
    model, processor, settings = build_trained(run)
    processor.proposals = model.proposal_source(settings.proposals or None)
    data = build_eval(settings, processor)
    scores: dict[str, list[tuple[int, int]]] = {}
    for index in tqdm(range(len(data)), unit="image"):
        sample = data[index]
        batch = collate([sample], processor, processor.levels, processor.conversation)
        images, branch = model.mask_branch.encode_batch(batch), model.mask_branch
        asked = *model.prompt_tokens(model.hidden_states(batch), batch), batch.image_index, images
        chain = MaskBranch(model.config, model.segmenting, None).segment(*asked)
        last = [found.masks[:, -1] for found in chain]
        alone, among = branch.score(*asked), branch.score(*asked, last)
        masks = torch.cat(last).numpy()
        targets = [(target, c.ignore) for c in sample.conversations for target in c.masks]
        for k, (target, ignore) in enumerate(targets):
            rows = candidates(
                masks[k], batch.proposals[0], of_one(alone, k), of_one(among, k), target
            )
            for name, found in rows.items():
                scores.setdefault(name, []).append(intersection_and_union(found, target, ignore))
    return summary(scores)


def summary(scores: dict[str, list[tuple[int, int]]]) -> dict[str, dict[str, float]]:
    """Row -> intersections and unions in pixels -> row -> {giou, ciou, n}."""
    out = {}
    for name, pairs in scores.items():
        inter, either = np.array(pairs).T
        out[name] = {"giou": giou(iou(inter, either)), "ciou": ciou(inter, either), "n": len(pairs)}
    return out


@command.entry()
def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    cores = "runs of CoReS, one after the other, with --llm_seg"
    parser.add_argument("--cores", type=Path, nargs="+", default=[], help=cores)
    parser.add_argument("--llm_seg", type=Path, help="run of LLM-Seg")
    parser.add_argument("--joint", type=Path, nargs="+", default=[], help="runs of cores+select")
    args = parser.parse_args(argv)
    if bool(args.cores) != bool(args.llm_seg) or not (args.cores or args.joint):
        parser.error("give --cores and --llm_seg, or --joint")
    results = {run.name: combine(run, args.llm_seg) for run in args.cores} | {
        run.name: joint(run) for run in args.joint
    }
    write_json(args.json, {"unit": "fraction", "mode": "teacher_forced", "runs": results})
    print(f"{'gIoU / cIoU, percent':22}" + "".join(f"{name:>16}" for name in results))
    for row in next(iter(results.values())):
        cells = (
            f"{100 * r[row]['giou']:.1f} / {100 * r[row]['ciou']:.1f}" for r in results.values()
        )
        print(f"{row:22}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
