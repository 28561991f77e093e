"""Parity of what stands around the model: token ids and labels, losses, metrics, masks of JSON
files, resizing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cores.dataset.annotations.masks import paint_shapes
from cores.dataset.conversation.encoding import Encoded, encode_conversation, encode_text
from cores.dataset.conversation.templates import ConversationTemplate, get_template
from cores.dataset.conversation.turns import AnswerToken, Conversation
from cores.dataset.readers.reasoning import read_record
from cores.model.checkpoints.published import IMAGE_MARKS
from cores.model.checkpoints.source import IMAGE_TOKEN, CLIPImageProcessor, load_tokenizer
from cores.model.losses import bce_per_mask, dice_per_mask
from cores.model.segmenting.frames import preprocess, resize_longest_side, to_original
from cores.utils import metrics
from tests.parity.table import METRIC_TOLERANCE, Table, added_tokens, read_tensors

IMAGE_TEXT = f"{IMAGE_MARKS[0]}{IMAGE_TOKEN}{IMAGE_MARKS[1]}"
# of every image; sequences are cut to model_max_length after that many are added
PUBLISHED_IMAGE_TOKENS = 256
ROUNDED = 1e-6

# ------------------------------------------------------------------------------------------- tokens


def compare_tokens(folder: Path, content: dict, table: Table) -> None:
    """Token ids, labels and attention masks of recorded conversations, and ids of single texts."""
    outputs = read_tensors(folder / "outputs.safetensors")
    special = content["special"]
    levels = ["SEG_SEMA", "SEG"] if "seg_sema_token_idx" in special else ["SEG"]
    tokenizer = published_tokenizer(folder, special, levels)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for name, case in content["cases"].items():
        rows = [
            encode_published(text, name.split(".")[0], tokenizer, levels)
            for text in case["conversations"]
        ]
        ids, labels, mask = padded(rows, special["pad"])
        ids = torch.where(ids == image_id, -200, ids)
        # the published collate cuts there; this program refuses or shortens by whole turns
        if not case["inference"]:
            width = special["model_max_length"] - PUBLISHED_IMAGE_TOKENS + 1
            ids, labels, mask = ids[:, :width], labels[:, :width], mask[:, :width]
        table.equal(f"{name}.input_ids", ids, outputs[f"{name}.input_ids"])
        table.equal(f"{name}.labels", labels, outputs[f"{name}.labels"])
        table.equal(f"{name}.attention_masks", mask, outputs[f"{name}.attention_masks"].long())
    for number, case in content.get("tokenize", {}).items():
        ids = torch.tensor(
            encode_text(
                case["text"], tokenizer, published_template("llava_v1"), IMAGE_TOKEN, levels
            )
        )
        table.equal(
            f"tokenize.{number}", torch.where(ids == image_id, -200, ids), torch.tensor(case["ids"])
        )


def published_tokenizer(folder: Path, special: dict, levels: list[str]):
    """The recorded tokenizer with its added tokens, which have to get the recorded ids, and <image>
    behind them."""
    tokenizer = load_tokenizer(str(folder))
    ids = added_tokens(special)
    tokenizer.add_tokens(sorted(ids, key=ids.get), special_tokens=True)
    for token, expected in ids.items():
        if tokenizer.convert_tokens_to_ids(token) != expected:
            raise ValueError(
                f"{folder}: {token} got the id {tokenizer.convert_tokens_to_ids(token)} instead of"
                f" {expected}"
            )
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def published_template(name: str) -> ConversationTemplate:
    return replace(get_template(name), image_marks=IMAGE_MARKS, strip_at_tokens=True)


def encode_published(text: str, name: str, tokenizer, levels: list[str]) -> Encoded:
    """A recorded conversation, taken apart into turns and written again by
    ``dataset.conversation.encoding``."""
    template = published_template(name)
    opening, text = text.split(IMAGE_TEXT)
    template = replace(template, opening=opening, image_gap="")
    later = f"</s>{'<s>' if template.bos_every_turn else ''}{template.user}"
    turns = []
    for turn in text.removesuffix("</s>").split(later):
        question, reply = turn.split(f"{template.assistant} ", 1)
        parts = re.split(r"\[(\w+)\]", reply.rstrip())
        answer = [
            AnswerToken(part) if index % 2 else part for index, part in enumerate(parts) if part
        ]
        turns.append((question, answer))
    conversation = Conversation(turns, np.zeros((0, 1, 1), dtype=bool))
    return encode_conversation(conversation, [], tokenizer, template, IMAGE_TOKEN, 1, levels)


def padded(rows: list[Encoded], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64 (N, L) each: ids, labels, attention mask, padded on the right."""
    stack = lambda lists, value: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
        [torch.tensor(values) for values in lists], batch_first=True, padding_value=value
    )
    mask = stack([[1] * len(row.input_ids) for row in rows], 0)
    return (
        stack([row.input_ids for row in rows], pad),
        stack([row.labels for row in rows], -100),
        mask,
    )


# ---------------------------------------------------------------------------------------- utilities


def compare_utilities(folder: Path, content: dict, table: Table) -> None:
    """Losses with gradients, counts and metrics, JSON masks, resizing and the way back to the
    original frame."""
    inputs, outputs = (
        read_tensors(folder / f"{name}.safetensors") for name in ("inputs", "outputs")
    )
    compare_losses(inputs, outputs, table)
    compare_counts(inputs, outputs, table)
    compare_metrics(inputs, content, table)
    compare_json(folder, content, outputs, table)
    compare_resizing(inputs, outputs, content, table)


def compare_losses(inputs: dict, outputs: dict, table: Table) -> None:
    functions = {"dice_loss": dice_per_mask, "sigmoid_ce_loss": bce_per_mask}
    for name in sorted(outputs):
        match = re.fullmatch(
            r"(loss\.\w+)\.(dice_loss|sigmoid_ce_loss)\.(grad|num_masks_(\d+))", name
        )
        if not match:
            continue
        case, kind, what, count = match.groups()
        logits = inputs[f"{case}.logits"].clone().requires_grad_()
        value = functions[kind](logits, inputs[f"{case}.target"].float()).sum()
        if what == "grad":
            (value / max(1, len(logits))).backward()
            table.tensors(name, logits.grad, outputs[name], ROUNDED)
        else:
            table.tensors(name, value / max(1, int(count)), outputs[name], ROUNDED * 10)


def compare_counts(inputs: dict, outputs: dict, table: Table) -> None:
    """Recorded are [background, target]."""
    for name in sorted(
        key.removesuffix(".output")
        for key in inputs
        if key.startswith("iou.") and key.endswith(".output")
    ):
        output, target = inputs[f"{name}.output"], inputs[f"{name}.target"]
        ignore = target == 255
        both = [metrics.intersection_and_union(output == c, target == c, ignore) for c in (0, 1)]
        for index, kind in enumerate(("intersection", "union")):
            ours = torch.tensor([int(counts[index]) for counts in both])
            table.equal(
                f"{name}.{kind}", ours.double(), outputs[f"{name}.{kind}"].double(), "pixels"
            )
        area = torch.tensor([int(((target == c) & ~ignore).sum()) for c in (0, 1)])
        table.equal(
            f"{name}.target_area", area.double(), outputs[f"{name}.target_area"].double(), "pixels"
        )


def compare_metrics(inputs: dict, content: dict, table: Table) -> None:
    images = sorted({key.split(".")[1] for key in inputs if key.startswith("validate.")}, key=int)
    inter, union = [], []
    for image in images:
        for logits, target in zip(
            inputs[f"validate.{image}.pred"], inputs[f"validate.{image}.gt"], strict=True
        ):
            i, u = metrics.intersection_and_union(logits > 0, target == 1, target == 255)
            inter.append(int(i))
            union.append(int(u))
    if images:
        table.add(
            "validate.giou",
            abs(metrics.giou(metrics.iou(inter, union)) - content["validate"]["giou"]),
            METRIC_TOLERANCE,
        )
        table.add(
            "validate.ciou",
            abs(metrics.ciou(inter, union) - content["validate"]["ciou"]),
            METRIC_TOLERANCE,
        )


def compare_json(folder: Path, content: dict, outputs: dict, table: Table) -> None:
    for file in sorted((folder / "json").glob("*.json")):
        recorded = content[f"json.{file.stem}"]
        record = read_record(file)
        target, ignore = paint_shapes(
            record["shapes"], tuple(outputs[f"json.{file.stem}.mask"].shape)
        )
        mask = np.where(ignore, 255, target.astype(np.uint8))
        table.equal(
            f"json.{file.stem}.mask",
            torch.from_numpy(mask.astype(np.uint8)),
            outputs[f"json.{file.stem}.mask"],
            "pixels",
        )
        table.add(
            f"json.{file.stem}.comments", record["text"] != recorded["comments"], 0, "differs"
        )
        table.add(
            f"json.{file.stem}.is_sentence",
            record["is_sentence"] is not recorded["is_sentence"],
            0,
            "differs",
        )


def compare_resizing(inputs: dict, outputs: dict, content: dict, table: Table) -> None:
    for number, recorded in content.get("resize", {}).items():
        name = f"resize.{number}"
        image = inputs.get(f"{name}.orig_u8_hwc")
        if image is None:
            table.left_out[name] = "its image is not recorded"
            continue
        pixels, size = preprocess(image.numpy(), recorded["target"])
        table.equal(
            f"{name}.resized", torch.tensor(size), torch.tensor(recorded["resized"]), "sides"
        )
        if f"{name}.resized_u8_hwc" in outputs:
            ours = torch.tensor(resize_longest_side(image.numpy(), recorded["target"]))
            table.equal(f"{name}.resized_u8_hwc", ours, outputs[f"{name}.resized_u8_hwc"], "values")
        if f"{name}.preprocessed" in outputs:
            table.tensors(f"{name}.preprocessed", pixels, outputs[f"{name}.preprocessed"], ROUNDED)
        total = recorded["preprocessed_abssum"]
        table.add(
            f"{name}.preprocessed_abssum, relative",
            abs(pixels.double().abs().sum().item() / total - 1),
            ROUNDED,
        )
    if "clip.orig_u8_hwc" in inputs:
        ours = CLIPImageProcessor()(
            images=Image.fromarray(inputs["clip.orig_u8_hwc"].numpy()), return_tensors="pt"
        )
        table.tensors(
            "clip.pixel_values", ours["pixel_values"][0], outputs["clip.pixel_values"], ROUNDED
        )
    for name in sorted(key.removesuffix(".low_res") for key in inputs if key.endswith(".low_res")):
        sizes = content[name]
        low_res = inputs[f"{name}.low_res"][:, 0]
        ours = to_original(
            low_res, tuple(sizes["input_size"]), tuple(sizes["original_size"]), sizes["img_size"]
        )
        table.tensors(f"{name}.out", ours[:, None], outputs[f"{name}.out"], ROUNDED * 10)
