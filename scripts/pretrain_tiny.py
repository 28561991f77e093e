"""Pre-trains the tiny backbones that ``configs/tiny.yaml`` starts from, and writes them to
``assets/tiny/``.

The order is that of the real recipe: a CLIP that knows what it sees, a promptable SAM, a LLaVA that
reads, answers and points; CoReS comes after (``train_ds.py``). All stages see scenes of SynthReason
only, drawn from seeds that neither the training nor the validation split uses, and no query with a
wording or a combination that is held out for validation.

    python scripts/pretrain_tiny.py all            # about an hour on 2 cores
    python scripts/pretrain_tiny.py clip           # one stage: clip, sam, llava or export

``llava`` needs what ``clip`` has written, ``export`` what all three have written.

Stages
  clip   every patch embedding, after LLaVA's projector, is asked for the words that describe the
         patch (category, colour, parts) and for the patch's own place: captioning at the level of
         patches.
  sam    box, point and mask prompts for objects, parts and unions of like parts (class-agnostic),
         beside a dense pretext from the encoder alone (foreground, boundaries, offsets to
         centroids). Without the pretext the prompts do not start to work.
  llava  captions and questions with places in text ("where are the eyes of the red dog?" "It is
         <c18>."), colours, and text-only facts ("what do you use to smell?"); the vision tower is
         frozen, the projector and the language model learn. The attention of one layer is
         supervised to look at the place, or the first useful attention takes thousands of steps
         (docs/experiments.md).
  export half-precision safetensors in the layouts that ``--version`` and ``--vision_pretrained``
         read.

S is the side of a scene in pixels, K a number of targets, C the width of a prompt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from cores.dataset.conversation.wordings import (
    PHRASE_QUESTIONS,
    SENTENCE_QUESTIONS,
    answer,
    phrase_question,
    sentence_question,
)
from cores.dataset.synthetic import vocabulary as world
from cores.dataset.synthetic.queries import host_phrases, make_query, plural
from cores.dataset.synthetic.scenes import (
    SIZE,
    PartInstance,
    SyntheticObject,
    SyntheticScene,
    make_scene,
)
from cores.model.checkpoints.sam import save_sam
from cores.model.config import SamDims
from cores.model.segmenting.sam import build_sam, decode_masks

GRID = 8  # CLIP's patches per side; also the grid of places that the language model names
PATCH = SIZE // GRID
HELD_BACK = 150  # the first scenes only measure, and are not trained on
SCENE_SEED = 777  # No scene on disk: those have generator keys of three numbers.
HIDDEN = 192
SUPERVISED_LAYER = 2  # The attention of this one of four layers is supervised.
# Frequent words, so that texts outside SynthReason (exemplars, a user's question) do not fall apart
# into letters.
ENGLISH = (Path(__file__).parent / "english_words.txt").read_text().split()
PART_WORDS = [plural(part) for parts in world.PARTS.values() for part in parts]
WORDS = [*world.COLOURS, *world.CATEGORIES, *PART_WORDS]
PLACES = [f"<c{i:02d}>" for i in range(GRID * GRID)]
TINY_SAM = SamDims(
    image_size=128,
    patch_size=8,
    embed_dim=128,
    depth=5,
    num_heads=4,
    global_attn_indexes=(),
    window_size=0,
    prompt_dim=128,
    decoder_heads=4,
    decoder_mlp_dim=256,
    mask_in_chans=16,
    iou_head_hidden_dim=128,
)


@dataclass
class SceneArrays:
    """Many scenes in little memory."""

    images: np.ndarray
    """uint8 (n, S, S, 3) RGB."""
    objects: np.ndarray
    """uint8 (n, S, S): 1-based object of every pixel, 0 = none."""
    parts: np.ndarray
    """uint8 (n, S, S): 1-based part instance of every pixel, 0 = none."""
    names: list[list[tuple[str, str, str, list[str]]]]
    """(category, colour, family, part names) of the objects of each scene, all in their order."""

    def scene(self, i: int) -> SyntheticScene:
        objects, numbers = [], itertools.count(1)
        for index, (category, colour, family, names) in enumerate(self.names[i], start=1):
            parts = [PartInstance(name, self.parts[i] == next(numbers)) for name in names]
            mask = self.objects[i] == index
            objects.append(SyntheticObject(category, colour, family, mask, parts))
        return SyntheticScene(self.images[i], objects)


def _pack(index: int):
    """The row of one scene in each field of SceneArrays."""
    scene = make_scene(np.random.default_rng([SCENE_SEED, index]))
    objects, parts = np.zeros((2, SIZE, SIZE), dtype=np.uint8)
    for number, obj in enumerate(scene.objects, start=1):
        objects[obj.mask] = number
    for number, part in enumerate((p for obj in scene.objects for p in obj.parts), start=1):
        parts[part.mask] = number
    names = [(o.category, o.colour, o.family, [p.name for p in o.parts]) for o in scene.objects]
    return scene.image, objects, parts, names


def make_scenes(count: int) -> SceneArrays:
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(_pack, range(count), chunksize=50))
    images, objects, parts, names = zip(*rows, strict=True)
    return SceneArrays(np.stack(images), np.stack(objects), np.stack(parts), list(names))


def pick(options: Sequence[Any], rng: np.random.Generator) -> Any:
    return options[rng.integers(len(options))]


def optimise(
    name: str,
    parameters: Iterable[nn.Parameter],
    steps: int,
    lr: float,
    step: Callable[[], dict],
    measure: Callable[[], dict],
) -> None:
    """AdamW with warm-up and cosine decay. ``step()`` returns losses, of which "loss" is minimised;
    ``measure()`` gives further numbers to print."""
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * i / steps))),
    )
    history: list[dict] = []
    for i in range(1, steps + 1):
        losses = step()
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        history.append({key: float(value.detach()) for key, value in losses.items()})
        if i % 100 == 0 or i == steps:
            keys = sorted({key for row in history for key in row})
            means = {k: float(np.mean([row[k] for row in history if k in row])) for k in keys}
            shown = {key: round(value, 4) for key, value in (means | measure()).items()}
            print(name, i, json.dumps(shown), flush=True)
            history = []


def normalised(images: np.ndarray, mean: list[float], std: list[float]) -> Tensor:
    """uint8 (n, S, S, 3) -> float (n, 3, S, S); ``mean`` and ``std`` in 0…255."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


# --------------------------------------------------------------------------------------------- clip


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )


def clip_pixels(images: np.ndarray) -> Tensor:
    processor = CLIPImageProcessor()
    mean, std = ([255 * v for v in x] for x in (processor.image_mean, processor.image_std))
    return normalised(images, mean, std)


def patches(mask: np.ndarray) -> np.ndarray:
    """Share of every patch that ``mask`` bool (S, S) covers: float (GRID²,)."""
    return mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel()


def patch_words(scene: SyntheticScene) -> np.ndarray:
    """float (GRID², words): 1 where the word describes the patch."""
    table = np.zeros((GRID * GRID, len(WORDS)), dtype=np.float32)
    for obj in scene.objects:
        on = patches(obj.mask) > 0.12
        table[on, WORDS.index(obj.category)] = table[on, WORDS.index(obj.colour)] = 1
        for part in obj.parts:
            table[patches(part.mask) > 0.07, WORDS.index(plural(part.name))] = 1
    return table


def train_clip(scenes: SceneArrays, steps: int, work: Path) -> None:
    torch.manual_seed(1)
    tables = [patch_words(scenes.scene(i)) for i in range(len(scenes.images))]
    words = torch.from_numpy(np.stack(tables))
    tower = CLIPVisionModel(clip_config())
    # The names of the layers are those of transformers' LlavaMultiModalProjector.
    layers = {"linear_1": nn.Linear(128, HIDDEN), "act": nn.GELU()}
    projector = nn.Sequential(OrderedDict(layers | {"linear_2": nn.Linear(HIDDEN, HIDDEN)}))
    embedding = nn.Parameter(torch.randn(len(WORDS) + len(PLACES), HIDDEN) * 0.1)
    bias = nn.Parameter(torch.full((len(WORDS),), -3.0))
    rng = np.random.default_rng(0)

    def logits(index) -> tuple[Tensor, Tensor]:
        h = projector(tower(clip_pixels(scenes.images[index])).last_hidden_state[:, 1:])
        scores = h @ embedding.T * 4
        return scores[..., : len(WORDS)] + bias, scores[..., len(WORDS) :]

    def step() -> dict:
        index = rng.integers(HELD_BACK, len(scenes.images), 24)
        named, placed = logits(index)
        word_loss = F.binary_cross_entropy_with_logits(named, words[index])
        places = torch.arange(len(PLACES)).repeat(len(index))
        place_loss = F.cross_entropy(placed.flatten(0, 1), places)
        return {"loss": 8 * word_loss + 0.3 * place_loss, "words": word_loss, "places": place_loss}

    @torch.no_grad()
    def measure() -> dict:
        named = logits(np.arange(HELD_BACK))[0] > 0
        target = words[:HELD_BACK] > 0
        return {"f1": float(2 * (named & target).sum() / (named.sum() + target.sum()))}

    parameters = [*tower.parameters(), *projector.parameters(), embedding, bias]
    optimise("clip", parameters, steps, 1e-3, step, measure)
    state = {"tower": tower.state_dict(), "projector": projector.state_dict()}
    torch.save(state | {"embedding": embedding.data}, work / "clip.pt")


# ---------------------------------------------------------------------------------------------- sam


def sam_pixels(images: np.ndarray) -> Tensor:
    return normalised(images, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def halved(maps: np.ndarray) -> Tensor:
    """(n, c, S, S) -> float (n, c, S/2, S/2): the low-res frame of the tiny SAM."""
    return F.avg_pool2d(torch.from_numpy(maps.astype(np.float32)), 2)


def boundary(label: np.ndarray) -> np.ndarray:
    """label (n, S, S) -> bool (n, S, S): a 4-neighbour belongs to another instance."""
    padded = np.pad(label, ((0, 0), (1, 1), (1, 1)), "edge")
    columns, rows = padded[:, 1:-1], padded[:, :, 1:-1]
    neighbours = (rows[:, 2:], rows[:, :-2], columns[:, :, 2:], columns[:, :, :-2])
    return np.any([label != n for n in neighbours], axis=0)


def centroid_offsets(label: np.ndarray) -> np.ndarray:
    """label (n, S, S) -> float (n, 2, S, S): (dy, dx) from a pixel to its instance's centroid, in
    units of 32 pixels."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    out = np.zeros((len(label), 2, SIZE, SIZE), dtype=np.float32)
    for b, ids in enumerate(label):
        count = np.bincount(ids.ravel()).clip(1)
        out[b, 0] = ((np.bincount(ids.ravel(), y.ravel()) / count)[ids] - y) / 32
        out[b, 1] = ((np.bincount(ids.ravel(), x.ravel()) / count)[ids] - x) / 32
    return out


def pretext_loss(prediction: Tensor, objects: np.ndarray, parts: np.ndarray) -> Tensor:
    """prediction (n, 8, S/2, S/2): object, part, their boundaries, offsets to the object's and to
    the part's centroid."""
    target = halved(np.stack([objects > 0, parts > 0, boundary(objects), boundary(parts)], axis=1))
    loss = 2 * F.binary_cross_entropy_with_logits(prediction[:, :4], target)
    for start, label, inside in ((4, objects, target[:, :1]), (6, parts, target[:, 1:2])):
        error = (prediction[:, start : start + 2] - halved(centroid_offsets(label))).abs()
        inside = inside > 0.5
        loss = loss + (error * inside).sum() / inside.sum().clamp(min=1) / 2
    return loss


def draw_targets(
    scene: SyntheticScene, count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, str]]:
    """(mask bool (S, S), kind): a quarter whole objects, a tenth single part instances, else unions
    of like parts."""
    out = []
    while len(out) < count:
        obj, draw = scene.objects[rng.integers(4)], rng.random()
        if draw < 0.25 or not obj.parts:
            target = (obj.mask, "object")
        elif draw < 0.35:
            target = (pick(obj.parts, rng).mask, "instance")
        else:
            target = (obj.union(pick(sorted({p.name for p in obj.parts}), rng)), "union")
        if target[0].any():
            out.append(target)
    return out


def draw_prompts(
    sam: nn.Module, targets: list[tuple[np.ndarray, str]], rng: np.random.Generator
) -> tuple[Tensor, list[str]]:
    """(sparse embeddings (K, 2, C), kinds). A point asks for like parts; a jittered box may ask for
    anything."""
    points = np.zeros((len(targets), 2, 2), np.float32)  # (x, y) in pixels
    # The labels are SAM's: -1 no point, 1 a point of the target, 2 and 3 the corners of a box.
    labels = np.zeros((len(targets), 2, 1), np.int64)
    kinds = []
    for k, (mask, kind) in enumerate(targets):
        ys, xs = np.nonzero(mask)
        if kind != "union" or rng.random() < 0.4:
            corners = np.array([[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]], np.float32)
            points[k] = corners + rng.uniform(-0.08, 0.08, (2, 2)) * np.ptp(corners, axis=0).max()
            labels[k, :, 0] = (2, 3)
            kinds.append(f"box_{kind}")
        else:
            i = rng.integers(len(ys))
            points[k, 0], labels[k, :, 0] = (xs[i] + 0.5, ys[i] + 0.5), (1, -1)
            kinds.append("point")
    encoder, label = sam.prompt_encoder, torch.from_numpy(labels)
    position = encoder.pe_layer.forward_with_coords(torch.from_numpy(points), (SIZE, SIZE))
    sparse = torch.where(label == -1, encoder.not_a_point_embed.weight, position)
    for value in (1, 2, 3):
        sparse = sparse + (label == value) * encoder.point_embeddings[value].weight
    return sparse, kinds


def low_res_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Balanced BCE + 2 BCE + DICE, mean over targets; both (K, h, w). Plain BCE settles on empty
    masks."""
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = (target > 0.5).float()
    outside = 1 - inside
    # Both sides of a mask weigh the same, however many pixels they have.
    share = inside / inside.sum((1, 2), keepdim=True).clamp(min=1)
    share = share + outside / outside.sum((1, 2), keepdim=True)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum((1, 2)) + 1) / (p.sum((1, 2)) + target.sum((1, 2)) + 1)
    return (0.5 * (bce * share).sum((1, 2)) + 2 * bce.mean((1, 2)) + dice).mean()


def low_res_iou(logits: Tensor, target: Tensor) -> Tensor:
    a, b = logits > 0, target > 0.5
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


def train_sam(
    scenes: SceneArrays, steps: int, work: Path, batch: int = 12, prompts: int = 8
) -> None:
    torch.manual_seed(0)
    sam = build_sam(TINY_SAM)
    head = nn.Conv2d(TINY_SAM.prompt_dim, 8 * 16, 1)  # the pretext's readout; thrown away
    rng = np.random.default_rng(0)

    def decode(
        embedding: Tensor, sparse: Tensor, dense: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, predicted = decode_masks(sam, embedding, sparse, dense)
        iou = low_res_iou(logits.detach(), target)
        return low_res_loss(logits, target) + F.mse_loss(predicted, iou), logits, iou

    def step() -> dict:
        index = rng.integers(HELD_BACK, len(scenes.images), batch)
        embeddings = sam.image_encoder(sam_pixels(scenes.images[index]))
        objects, parts = scenes.objects[index].astype(int), scenes.parts[index].astype(int)
        pretext = pretext_loss(F.pixel_shuffle(head(embeddings), 4), objects, parts)
        targets = [target for i in index for target in draw_targets(scenes.scene(i), prompts, rng)]
        sparse, kinds = draw_prompts(sam, targets, rng)
        masks = halved(np.stack([mask for mask, _ in targets])[:, None])[:, 0]
        spread = embeddings.repeat_interleave(prompts, dim=0)
        no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(spread)
        loss, logits, iou = decode(spread, sparse, no_mask, masks)
        # The mask of a first step is the prompt of a second, as in CoReS's chain.
        if rng.random() < 0.4:
            some = torch.from_numpy(rng.choice(len(targets), len(targets) // 2, replace=False))
            dense = sam.prompt_encoder.mask_downscaling(logits[some, None].detach())
            loss = loss + 0.5 * decode(spread[some], sparse[some], dense, masks[some])[0]
        of = np.array(kinds)
        by_kind = {kind: iou[torch.from_numpy(of == kind)].mean() for kind in sorted(set(kinds))}
        return {"loss": loss + pretext, "pretext": pretext} | by_kind

    optimise("sam", [*sam.parameters(), *head.parameters()], steps, 8e-4, step, dict)
    torch.save(sam.state_dict(), work / "sam.pt")


# -------------------------------------------------------------------------------------------- llava


def corpus(scenes: SceneArrays) -> list[str]:
    """Texts that the tokenizer is fitted to: the words of every split, frequent English words and
    the question wordings."""
    rng = np.random.default_rng(0)
    queries = [
        make_query(scenes.scene(i), split, rng).texts[0]
        for i in range(1500)
        for split in ("train", "train", "val")
    ]
    starts = ("It", "What", "Which", "Where", "How", "The", "In", "On", "Can", "Is")
    questions = [text.replace("{text}", "") for text in (*PHRASE_QUESTIONS, *SENTENCE_QUESTIONS)]
    frame = (
        "USER: ASSISTANT: It appears on. It usually appears on. You find it at. What colour is it?"
        " Tell me about it."
    )
    words = [*WORDS, *(part for names in world.PARTS.values() for part in names)]
    texts = [*queries, *ENGLISH * 10, *starts * 40, *questions * 100, *[frame] * 200, *words * 100]
    return [f" {text}" for text in texts]


def make_tokenizer(scenes: SceneArrays) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(scenes), trainer)
    tokenizer.add_tokens([AddedToken(place, normalized=False) for place in PLACES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def place_of(mask: np.ndarray, rng: np.random.Generator) -> str:
    """The place of a random pixel of the mask: the model learns the distribution of places, all
    instances included."""
    ys, xs = np.nonzero(mask)
    i = rng.integers(len(ys))
    return PLACES[ys[i] // PATCH * GRID + xs[i] // PATCH]


def draw_turn(scene: SyntheticScene, rng: np.random.Generator, easy: bool) -> tuple[str, str]:
    """One question with its answer; ``easy``: about whole objects only."""
    draw, index = rng.random(), int(rng.integers(len(scene.objects)))
    draw = 0.55 + 0.29 * draw if easy else draw  # The range of the two kinds about objects.
    obj, host = scene.objects[index], pick(host_phrases(scene, index), rng)
    if draw < 0.72:
        return draw_location(scene, index, draw < 0.55, rng)
    if draw < 0.84:
        return f"tell me about {host}.", describe(obj, rng)
    phrases = host_phrases(scene, index)[1:]
    if draw < 0.89 and phrases:
        return f"what colour is {pick(phrases, rng)}?", f"It is {obj.colour}."
    if draw < 0.93:
        return f"what is at {place_of(obj.mask, rng)}?", f"the {obj.colour} {obj.category}."
    return draw_fact(obj, draw, rng)


def draw_location(
    scene: SyntheticScene, index: int, part: bool, rng: np.random.Generator
) -> tuple[str, str]:
    """Where a part or a whole object is. Questions and answers have the forms of training, with
    places in text where the answer tokens will stand. Every other answer about a part names the
    place of its host first, so the model knows chains of one and of two levels alike."""
    obj, text, sentence = scene.objects[index], pick(host_phrases(scene, index), rng), False
    target, levels = obj.mask, ["SEG"]
    if part:
        query = make_query(scene, "train", rng)
        obj, text, sentence = scene.objects[query.object_index], query.texts[0], query.is_sentence
        target, levels = obj.union(query.part), pick((["SEG"], ["LOC", "SEG"]), rng)
    if rng.random() < 0.7:
        text = sentence_question(text, rng) if sentence else phrase_question(text, rng)
    elif not sentence:
        text = pick(("where is {}?", "find {}.", "show {}."), rng).format(text)
    pieces = answer(levels, rng)
    where = {"LOC": obj.mask, "SEG": target}
    return text, "".join(p if isinstance(p, str) else place_of(where[p.level], rng) for p in pieces)


def describe(obj: SyntheticObject, rng: np.random.Generator) -> str:
    held_out = [p.name for p in obj.parts if world.held_out(obj.colour, obj.category, p.name)]
    names = sorted({p.name for p in obj.parts} - set(held_out))
    rng.shuffle(names)
    sentences = []
    for name in names:
        verb = "is" if plural(name) == name else "are"
        sentences.append(f" the {plural(name)} {verb} at {place_of(obj.union(name), rng)}.")
    return f"the {obj.colour} {obj.category} is at {place_of(obj.mask, rng)}." + "".join(sentences)


def draw_fact(obj: SyntheticObject, draw: float, rng: np.random.Generator) -> tuple[str, str]:
    """Text only, world knowledge that a real language model brings along."""
    if draw < 0.97:
        part = pick(world.PARTS[obj.family], rng)
        questions = (
            "what do you use to {}?",
            "which thing do you rely on to {}?",
            "which part can {}?",
        )
        question = pick(questions, rng)
        return question.format(pick(world.PURPOSES[part], rng)), f"the {plural(part)}."
    if draw < 0.98:
        question = (
            f"what parts belong on a {obj.category}? name the things belonging to it, with segment"
            " and part."
        )
        return question, ", ".join(plural(p) for p in world.PARTS[obj.family]) + "."
    category = pick(world.CATEGORIES, rng)
    return f"who {world.HABITS[category]}?", f"the {category}."


def encode_turns(tokenizer, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation in the ``tiny`` template; the image stands before the first
    question."""
    ids, labels = [tokenizer.bos_token_id], [-100]
    image = [tokenizer.convert_tokens_to_ids("<image>")] * GRID * GRID
    for k, (question, reply) in enumerate(turns):
        # A place has no space before it, as the answer tokens will have none.
        texts = "USER:", f" {question} ASSISTANT:", re.sub(r" (<c\d\d>)", r"\1", " " + reply)
        user, asked, answered = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        prompt = user + (image if k == 0 else []) + asked
        target = [*answered, tokenizer.eos_token_id]
        ids += prompt + target
        labels += [-100] * len(prompt) + target
    return ids, labels


def new_llava(tokenizer, clip_state: dict) -> LlavaForConditionalGeneration:
    """A LLaVA whose words start from the embeddings that CLIP's stage learned for them, so image
    and text share one space from the first step."""
    torch.manual_seed(2)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    text._attn_implementation = "eager"  # Only eager attention returns its weights.
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip_state["tower"])
    model.model.multi_modal_projector.load_state_dict(clip_state["projector"])
    rows = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in WORDS]
    split = [word for word, row in zip(WORDS, rows, strict=True) if len(row) != 1]
    if split:
        raise ValueError(
            f"the tokenizer splits these words: {split}; raise their weight in corpus()"
        )
    with torch.no_grad():
        table = model.get_input_embeddings().weight.normal_(0, 0.1)
        known = [row[0] for row in rows] + tokenizer.convert_tokens_to_ids(PLACES)
        table[torch.tensor(known)] = clip_state["embedding"]
        model.lm_head.weight.copy_(table)
        for layer in model.model.language_model.layers:
            start_by_content(layer.self_attn)
    return model


def start_by_content(attention: nn.Module) -> None:
    """Queries and keys start alike, and the output undoes the value, so a word first attends to
    what has the same word in it and copies it (mimetic initialisation, Trockman and Kolter,
    2023)."""
    query_key, value = (nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)) for _ in range(2))
    start = {"q": 0.8 * query_key, "k": 0.8 * query_key, "v": 0.7 * value, "o": 0.7 * value.T}
    for name, weight in start.items():
        getattr(attention, f"{name}_proj").weight.copy_(weight + 0.02 * torch.randn_like(weight))


@torch.no_grad()
def centre_projector(model: LlavaForConditionalGeneration, images: np.ndarray) -> None:
    """Takes the part that all image tokens share out of them and brings them to the norm of words.
    The shared part is two thirds of what CLIP's stage leaves, and hides from attention what tells
    patches apart."""
    last = model.model.multi_modal_projector.linear_2
    features = model.model.vision_tower(clip_pixels(images)).last_hidden_state[:, 1:]
    last.bias -= model.model.multi_modal_projector(features).mean((0, 1))
    last.weight *= 0.15
    last.bias *= 0.15


def train_llava(
    scenes: SceneArrays, steps: int, work: Path, batch: int = 12, turns: int = 8
) -> None:
    tokenizer = make_tokenizer(scenes)
    tokenizer.save_pretrained(work / "tokenizer")
    model = new_llava(tokenizer, torch.load(work / "clip.pt", weights_only=True))
    centre_projector(model, scenes.images[:400])
    tower = model.model.vision_tower.requires_grad_(False)
    image_id, first = tokenizer.convert_tokens_to_ids(["<image>", PLACES[0]])
    with torch.no_grad():
        chunks = np.array_split(scenes.images, range(100, len(scenes.images), 100))
        states = [tower(clip_pixels(images)).last_hidden_state[:, 1:] for images in chunks]
        features = torch.cat(states)
    rng = np.random.default_rng(0)
    steps_taken = itertools.count(1)

    def padded(lists: Iterable[list[int]], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(x) for x in lists], True, value)

    def is_place(labels: Tensor) -> Tensor:
        return (labels >= first) & (labels < first + len(PLACES))

    def predict(index, rows) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, vocabulary) and labels (n,) at the supervised positions, and the loss of
        attention that looks elsewhere than at the place."""
        ids = padded((ids for ids, _ in rows), tokenizer.pad_token_id)
        labels = padded((labels for _, labels in rows), -100)[:, 1:]
        image = model.model.multi_modal_projector(features[index])
        embeddings = model.get_input_embeddings()(ids)
        inputs = embeddings.masked_scatter((ids == image_id)[..., None], image)
        out = model.model.language_model(inputs_embeds=inputs, output_attentions=True)
        row, position = is_place(labels).nonzero(as_tuple=True)
        patch = (ids == image_id).int().argmax(1)[row] + labels[row, position] - first
        attention = out.attentions[SUPERVISED_LAYER].mean(1)[row, position, patch]
        chosen = labels >= 0
        logits = model.lm_head(out.last_hidden_state[:, :-1][chosen])
        return logits, labels[chosen], -(attention + 1e-6).log().mean()

    def step() -> dict:
        index = rng.integers(HELD_BACK, len(scenes.images), batch)
        easy = next(steps_taken) <= 300
        rows = [
            encode_turns(tokenizer, [draw_turn(scenes.scene(i), rng, easy) for _ in range(turns)])
            for i in index
        ]
        logits, labels, looking = predict(index, rows)
        places = is_place(labels)
        place = F.cross_entropy(logits[places], labels[places])
        loss = F.cross_entropy(logits, labels) + 0.5 * looking
        return {"loss": loss, "place": place.detach(), "looking": looking.detach()}

    @torch.no_grad()
    def measure() -> dict:
        """Share of held-back scenes where the best place of a *validation* query shows the part,
        and where it shows the host."""
        draw, part, host = np.random.default_rng(5), [], []
        for i in range(HELD_BACK):
            scene = scenes.scene(i)
            query = make_query(scene, "val", draw)
            question = sentence_question if query.is_sentence else phrase_question
            turn = (question(query.texts[0]), f"It is {PLACES[0]}.")
            logits, labels, _ = predict([i], [encode_turns(tokenizer, [turn])])
            place = int(logits[labels == first][0, first : first + len(PLACES)].argmax())
            obj = scene.objects[query.object_index]
            part.append(patches(obj.union(query.part))[place] > 0.05)
            host.append(patches(obj.mask)[place] > 0.05)
        return {"part": float(np.mean(part)), "host": float(np.mean(host))}

    optimise("llava", model.parameters(), steps, 1.5e-3, step, measure)
    torch.save(model.state_dict(), work / "llava.pt")


# ------------------------------------------------------------------------------------------- export


def export(work: Path, out: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model = new_llava(tokenizer, torch.load(work / "clip.pt", weights_only=True))
    model.load_state_dict(torch.load(work / "llava.pt", weights_only=True))
    model.config.text_config._attn_implementation = None
    model.half().save_pretrained(out / "llava")
    tokenizer.save_pretrained(out / "llava")
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(out / "llava")
    sam = build_sam(TINY_SAM)
    sam.load_state_dict(torch.load(work / "sam.pt", weights_only=True))
    save_sam(sam.half(), TINY_SAM, out / "sam")
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {total / 1e6:.1f} MB")


@command.entry()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=["all", "clip", "sam", "llava", "export"])
    add("--out", type=Path, default=Path("assets/tiny"))
    work = Path("runs/pretrain_tiny")
    add("--work", type=Path, default=work, help="where the stages leave their weights")
    add("--scenes", type=int, default=4000)
    add("--clip_steps", type=int, default=1700)
    add("--sam_steps", type=int, default=1200)
    add("--llava_steps", type=int, default=2000)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # Sharp attention is full of denormals, which are slow.
    if args.stage != "export":
        scenes = make_scenes(args.scenes)
        for stage, train in (("clip", train_clip), ("sam", train_sam), ("llava", train_llava)):
            if args.stage in (stage, "all"):
                train(scenes, getattr(args, f"{stage}_steps"), args.work)
    if args.stage in ("export", "all"):
        export(args.work, args.out)


if __name__ == "__main__":
    sys.exit(main())
