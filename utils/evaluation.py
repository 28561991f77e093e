"""Evaluation on every rank at once: teacher-forced, as published, or by free generation, as a user would ask.

Teacher-forced evaluation puts the answer with its tokens into the prompt, so a mask always comes out; the published numbers are such.
Free generation lets the model speak; an answer without a complete group of tokens has no mask and scores as an empty one.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from dataset.conversation import answer_from_ids, answer_text
from dataset.sample import Batch, Sample, collate, collate_prompts
from model.cores import CoresForReasoningSegmentation, Segmentation
from model.processor import CoresProcessor
from utils import distributed
from utils.baselines import baselines
from utils.checkpoint import write_text
from utils.metrics import bootstrap, ciou, giou, intersection_and_union, iou
from utils.visualize import Example, contact_sheet

MODES = ("free", "teacher_forced")


@dataclass
class Report:
    """``rows``: one dict per target. ``summary``: scores as fractions. ``examples``: pictures of this rank's first targets."""

    mode: str
    rows: list[dict[str, Any]]
    seed: int = 0
    examples: list[Example] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        inter, union = self._column("intersection"), self._column("union")
        out: dict[str, Any] = {"targets": len(self.rows), "giou": giou(inter, union), "ciou": ciou(inter, union)}
        out["ci95"] = bootstrap(inter, union, self.seed)
        if self.mode == "free":
            out["emission_rate"] = float(self._column("emitted").mean()) if self.rows else float("nan")
        for name, flag in (("short", False), ("long", True)):
            chosen = np.array([row["is_sentence"] is flag for row in self.rows], dtype=bool)
            if chosen.any():
                out[f"giou_{name}"] = giou(inter[chosen], union[chosen])
        hosts = [row for row in self.rows if row["first_host_iou"] is not None]
        if hosts:
            out["first_mask_host_iou"] = float(np.mean([row["first_host_iou"] for row in hosts]))
            out["wrong_host_rate"] = float(np.mean([row["wrong_host"] for row in hosts]))
        return out

    def _column(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.rows], dtype=float)

    def line(self) -> str:
        s = self.summary
        emitted = f", answers with a mask {100 * s['emission_rate']:.1f} %" if "emission_rate" in s else ""
        return f"gIoU {100 * s['giou']:.1f}, cIoU {100 * s['ciou']:.1f} over {s['targets']} targets{emitted}"


def evaluate(
    model: CoresForReasoningSegmentation,
    processor: CoresProcessor,
    data: Dataset,
    mode: str = "free",
    *,
    batch_size: int = 1,
    max_new_tokens: int = 64,
    limit: int | None = None,
    examples: int = 0,
    seed: int = 0,
) -> Report:
    """Scores every target of ``data`` once; ranks share the images. ``limit``: the first images only.

    Returns the same rows, in the order of the data, on every rank. Only numbers per target are kept, and ``examples`` pictures.
    """
    if mode not in MODES:
        raise ValueError(f"evaluation mode {mode!r}; choose one of {', '.join(MODES)}")
    count = len(data) if limit is None else min(limit, len(data))
    indices = list(range(distributed.rank(), count, distributed.world_size()))
    build = collate_prompts if mode == "free" else collate

    def prepare(samples: list[Sample]) -> tuple[list[Sample], Batch]:
        return samples, build(samples, processor, processor.levels, processor.template)

    loader = DataLoader(Subset(data, indices), batch_size, collate_fn=prepare)
    was_training = model.training
    model.eval()
    report = Report(mode, [], seed)
    device, dtype = model.device, model.dtype
    images = 0
    for samples, batch in tqdm(loader, desc=f"evaluating, {mode}", disable=not distributed.is_main(), leave=False):
        batch = batch.to(device, dtype)
        results = _predict(model, processor, batch, mode, max_new_tokens)
        for row, result in enumerate(results):
            position = indices[images + int(batch.image_index[row])]
            report.rows += _score(batch, row, result, position)
            if len(report.examples) < examples:
                image = samples[int(batch.image_index[row])].image
                report.examples += _pictures(image, batch, row, result, processor)
        images += len(samples)
    model.train(was_training)
    report.rows = sorted(distributed.gather_lists(report.rows), key=lambda r: (r["index"], r["conversation"], r["target"]))
    report.examples = report.examples[:examples]
    return report


def _predict(model, processor, batch: Batch, mode: str, max_new_tokens: int) -> list[Segmentation]:
    if mode == "teacher_forced":
        return model.segment(batch)
    return model.generate(batch, processor.tokenizer, max_new_tokens=max_new_tokens)


def _level_masks(result: Segmentation, target: int, size: tuple[int, int]) -> np.ndarray | None:
    """bool (T, H, W) of one target, None if the answer has no mask for it."""
    return result.masks[target].cpu().numpy() if target < len(result.masks) else None


def _score(batch: Batch, row: int, result: Segmentation, position: int) -> list[dict[str, Any]]:
    info, ignore, hosts = batch.info[row], batch.ignore_masks[row], batch.host_masks[row]
    ignore = None if ignore is None else ignore.cpu().numpy()
    rows = []
    for target, truth in enumerate(batch.target_masks[row].cpu().numpy()):
        masks = _level_masks(result, target, truth.shape)
        last = np.zeros_like(truth) if masks is None else masks[-1]
        inter, union = intersection_and_union(last, truth, ignore)
        rows.append(
            {
                **{key: info[key] for key in ("dataset", "id", "image_path", "query", "is_sentence", "conversation")},
                "index": position,
                "target": target,
                "intersection": inter,
                "union": union,
                "iou": float(iou(inter, union)),
                "emitted": masks is not None,
                "target_pixels": int(truth.sum()),
                **_host_scores(masks, last, None if hosts is None else hosts[target].cpu().numpy()),
            }
        )
    return rows


def _host_scores(masks: np.ndarray | None, last: np.ndarray, host: np.ndarray | None) -> dict[str, Any]:
    """Why a run is good or stuck: does the first mask cover the host, does the last one lie on another object?"""
    if host is None:
        return {"first_host_iou": None, "wrong_host": None}
    first = np.zeros_like(host) if masks is None else masks[0]
    outside = (last & ~host).sum() > 0.5 * last.sum() if last.any() else True
    return {"first_host_iou": float(iou(*intersection_and_union(first, host))), "wrong_host": bool(outside)}


def _pictures(image: np.ndarray, batch: Batch, row: int, result: Segmentation, processor: CoresProcessor) -> list[Example]:
    out = []
    said = answer_text(answer_from_ids(result.token_ids, processor.tokenizer, processor.levels)) if hasattr(result, "token_ids") else None
    for target, truth in enumerate(batch.target_masks[row].cpu().numpy()):
        masks = _level_masks(result, target, truth.shape)
        score = float(iou(*intersection_and_union(np.zeros_like(truth) if masks is None else masks[-1], truth)))
        empty = np.zeros((len(processor.levels), *truth.shape), dtype=bool)
        levels = dict(zip(processor.levels, empty if masks is None else masks, strict=True))
        out.append(Example(image, batch.info[row]["query"], said, levels, truth, score))
    return out


# ----------------------------------------------------------------------------------------------------------------- reports


def table(reports: list[Report], trivial: dict[str, dict[str, float]]) -> str:
    """Scores in percent with 95 % bootstrap intervals."""
    header = f"{'':24} {'gIoU':>6} {'95 % interval':>15} {'cIoU':>6} {'short':>6} {'long':>6} {'emission':>9}"
    lines = [header, "-" * len(header)]
    percent = lambda value: f"{100 * value:6.1f}" if value is not None else f"{'–':>6}"  # noqa: E731
    for report in reports:
        s = report.summary
        low, high = (100 * v for v in s["ci95"]["giou"])
        emission = f"{100 * s['emission_rate']:8.1f}%" if "emission_rate" in s else f"{'–':>9}"
        lines.append(
            f"{report.mode.replace('_', ' '):24} {percent(s['giou'])} {f'{low:.1f} … {high:.1f}':>15} {percent(s['ciou'])} "
            f"{percent(s.get('giou_short'))} {percent(s.get('giou_long'))} {emission}"
        )
    for name, scores in trivial.items():
        lines.append(f"{name:24} {percent(scores['giou'])} {'':>15} {percent(scores['ciou'])}")
    return "\n".join(lines)


def metrics(reports: list[Report], trivial: dict, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What metrics.json holds; every score is a fraction."""
    import peft
    import transformers

    out: dict[str, Any] = {"unit": "fraction", "seconds": round(seconds, 1)}
    for report in reports:
        out[report.mode] = report.summary
        if "emission_rate" in report.summary:
            out["emission_rate"] = report.summary["emission_rate"]
    steps = settings["epochs"] * settings["steps_per_epoch"]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    out |= {"baselines": trivial, "steps": steps, "settings": settings, "versions": versions | {"peft": peft.__version__}}
    return out


def write_reports(reports: list[Report], data: Dataset, run: Path, settings: dict[str, Any], seconds: float) -> None:
    """Prints the table and writes metrics.json, rows.json (per target) and examples.png into the run folder."""
    trivial = baselines(data)
    print(table(reports, trivial), flush=True)
    write_text(run / "metrics.json", json.dumps(metrics(reports, trivial, settings, seconds), indent=1) + "\n")
    write_text(run / "rows.json", json.dumps({report.mode: report.rows for report in reports}) + "\n")
    pictured = next((report for report in reports if report.examples), None)
    if pictured is not None:
        title = f"{settings['val_dataset']} · {settings['method']} · {pictured.mode.replace('_', ' ')} · {pictured.line()}"
        contact_sheet(pictured.examples, run / "examples.png", title)
        print(f"pictures: {run / 'examples.png'}", flush=True)
    print(f"numbers:  {run / 'metrics.json'}", flush=True)
