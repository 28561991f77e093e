"""Pre-trains the tiny backbones that ``configs/tiny.yaml`` starts from, and writes them to
``assets/tiny/``.

The order is that of the real recipe: a CLIP that knows what it sees, a promptable SAM, a LLaVA that
reads, answers and points; CoReS comes after (``train_ds.py``). All stages see scenes of SynthReason
only, drawn from seeds that neither the training nor the validation split uses, and no query with a
wording or a combination that is held out for validation.

    python scripts/pretrain_tiny.py all            # about an hour on 2 cores
    python scripts/pretrain_tiny.py clip           # one stage: clip, sam, llava or export; `llava` needs `clip`, `export` all three

Stages
  clip   every patch embedding, after LLaVA's projector, is asked for the words that describe the patch (category, colour, parts)
         and for the patch's own place: captioning at the level of patches.
  sam    box, point and mask prompts for objects, parts and unions of like parts (class-agnostic), beside a dense pretext from the
         encoder alone (foreground, boundaries, offsets to centroids). Without the pretext the prompts do not start to work.
  llava  captions and questions with places in text ("where are the eyes of the red dog?" "It is <c18>."), colours, and text-only
         facts ("what do you use to smell?"); the vision tower is frozen, the projector and the language model learn. One layer's
         attention is told where to look, or the first useful attention takes thousands of steps (docs/experiments.md).
  export half-precision safetensors in the layouts that ``--version`` and ``--vision_pretrained`` read.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.conversation.wordings import (
    PHRASE_QUESTIONS,
    SENTENCE_QUESTIONS,
    answer,
    phrase_question,
    sentence_question,
)
from dataset.synthetic import write as world
from dataset.synthetic.queries import host_phrases, make_query, plural
from dataset.synthetic.scenes import Part, Scene, SceneObject, make_scene
from dataset.synthetic.vocabulary import held_out
from model.checkpoints.sam import save_sam
from model.config import SamDims
from model.segmenting.sam import build_sam, decode_masks

GRID = 8  # CLIP's patches per side; also the grid of places that the language model speaks of
PATCH = world.SIZE // GRID
HELD_BACK = 150  # scenes of the store that only measure
# apart from every seed of the data set on disk, whose generator keys have three numbers
SCENE_SEED = 777
HIDDEN = 192
LOOKING_LAYER = 2  # of four: its attention is supervised in pre-training
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


# ------------------------------------------------------------------------------------ scenes in RAM


@dataclass
class Store:
    """``images`` uint8 (n, S, S, 3); ``objects`` and ``parts`` uint8 (n, S, S): 1-based instance of
    every pixel, 0 = none."""

    images: np.ndarray
    objects: np.ndarray
    parts: np.ndarray
    meta: list[list[tuple[str, str, str, list[tuple[str, int]]]]]

    def scene(self, i: int) -> Scene:
        return Scene(
            self.images[i],
            [
                SceneObject(
                    category,
                    colour,
                    family,
                    self.objects[i] == j + 1,
                    [Part(n, self.parts[i] == k) for n, k in parts],
                )
                for j, (category, colour, family, parts) in enumerate(self.meta[i])
            ],
        )


def _pack(index: int):
    scene = make_scene(np.random.default_rng([SCENE_SEED, index]))
    objects, parts = np.zeros((2, world.SIZE, world.SIZE), dtype=np.uint8)
    meta, k = [], 0
    for j, obj in enumerate(scene.objects):
        objects[obj.mask] = j + 1
        names = []
        for part in obj.parts:
            k += 1
            parts[part.mask] = k
            names.append((part.name, k))
        meta.append((obj.category, obj.colour, obj.family, names))
    return scene.image, objects, parts, meta


def make_store(count: int) -> Store:
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(_pack, range(count), chunksize=50))
    images, objects, parts, meta = zip(*rows, strict=True)
    return Store(np.stack(images), np.stack(objects), np.stack(parts), list(meta))


def optimise(
    name: str,
    parameters: Iterable[nn.Parameter],
    steps: int,
    lr: float,
    step: Callable[[], dict],
    measure: Callable[[], dict],
) -> None:
    """AdamW with warm-up and cosine decay. ``step()`` returns losses with the key "loss" to
    minimise."""
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
            means = {
                key: float(np.mean([row[key] for row in history if key in row])) for key in keys
            }
            print(
                name,
                i,
                json.dumps({k: round(v, 4) for k, v in (means | measure()).items()}),
                flush=True,
            )
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
        image_size=world.SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )


def clip_pixels(images: np.ndarray) -> Tensor:
    processor = CLIPImageProcessor()
    return normalised(
        images, [255 * v for v in processor.image_mean], [255 * v for v in processor.image_std]
    )


def patches(mask: np.ndarray) -> np.ndarray:
    """Share of every patch that ``mask`` bool (S, S) covers: float (GRID²,)."""
    return mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel()


def patch_words(scene: Scene) -> np.ndarray:
    """float (GRID², words): 1 where the word describes the patch."""
    table = np.zeros((GRID * GRID, len(WORDS)), dtype=np.float32)
    for obj in scene.objects:
        on = patches(obj.mask) > 0.12
        table[on, WORDS.index(obj.category)] = table[on, WORDS.index(obj.colour)] = 1
        for part in obj.parts:
            table[patches(part.mask) > 0.07, WORDS.index(plural(part.name))] = 1
    return table


class Projector(nn.Module):
    """The layers of transformers' LlavaMultiModalProjector under the same names."""

    def __init__(self):
        super().__init__()
        self.linear_1 = nn.Linear(128, HIDDEN)
        self.linear_2 = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


def train_clip(store: Store, steps: int, work: Path) -> None:
    torch.manual_seed(1)
    words = torch.from_numpy(
        np.stack([patch_words(store.scene(i)) for i in range(len(store.images))])
    )
    tower, projector = CLIPVisionModel(clip_config()), Projector()
    embedding = nn.Parameter(torch.randn(len(WORDS) + len(PLACES), HIDDEN) * 0.1)
    bias = nn.Parameter(torch.full((len(WORDS),), -3.0))
    rng = np.random.default_rng(0)

    def logits(index) -> tuple[Tensor, Tensor]:
        h = projector(tower(clip_pixels(store.images[index])).last_hidden_state[:, 1:])
        scores = h @ embedding.T * 4
        return scores[..., : len(WORDS)] + bias, scores[..., len(WORDS) :]

    def step() -> dict:
        index = rng.integers(HELD_BACK, len(store.images), 24)
        named, placed = logits(index)
        word_loss = F.binary_cross_entropy_with_logits(named, words[index])
        place_loss = F.cross_entropy(
            placed.flatten(0, 1), torch.arange(len(PLACES)).repeat(len(index))
        )
        return {"loss": 8 * word_loss + 0.3 * place_loss, "words": word_loss, "places": place_loss}

    @torch.no_grad()
    def measure() -> dict:
        named = logits(np.arange(HELD_BACK))[0] > 0
        truth = words[:HELD_BACK] > 0
        return {"f1": float(2 * (named & truth).sum() / (named.sum() + truth.sum()))}

    parameters = [*tower.parameters(), *projector.parameters(), embedding, bias]
    optimise("clip", parameters, steps, 1e-3, step, measure)
    torch.save(
        {
            "tower": tower.state_dict(),
            "projector": projector.state_dict(),
            "embedding": embedding.data,
        },
        work / "clip.pt",
    )


# ---------------------------------------------------------------------------------------------- sam


def sam_pixels(images: np.ndarray) -> Tensor:
    return normalised(images, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def halved(maps: np.ndarray) -> Tensor:
    """(n, c, S, S) -> float (n, c, S/2, S/2): the low-res frame of the tiny SAM."""
    return F.avg_pool2d(torch.from_numpy(maps.astype(np.float32)), 2)


def boundary(label: np.ndarray) -> np.ndarray:
    """label (n, S, S) -> bool (n, S, S): a 4-neighbour belongs to another instance."""
    padded = np.pad(label, ((0, 0), (1, 1), (1, 1)), "edge")
    neighbours = (
        padded[:, 2:, 1:-1],
        padded[:, :-2, 1:-1],
        padded[:, 1:-1, 2:],
        padded[:, 1:-1, :-2],
    )
    return np.any([label != n for n in neighbours], axis=0)


def centroid_offsets(label: np.ndarray) -> np.ndarray:
    """label (n, S, S) -> float (n, 2, S, S): (dy, dx) from a pixel to its instance's centroid, in
    units of 32 pixels."""
    y, x = np.mgrid[0 : world.SIZE, 0 : world.SIZE]
    out = np.zeros((len(label), 2, world.SIZE, world.SIZE), dtype=np.float32)
    for b, ids in enumerate(label):
        count = np.bincount(ids.ravel()).clip(1)
        out[b, 0] = ((np.bincount(ids.ravel(), y.ravel()) / count)[ids] - y) / 32
        out[b, 1] = ((np.bincount(ids.ravel(), x.ravel()) / count)[ids] - x) / 32
    return out


def pretext_loss(prediction: Tensor, objects: np.ndarray, parts: np.ndarray) -> Tensor:
    """prediction (n, 8, S/2, S/2): object, part, their boundaries, offsets to the object's and to
    the part's centroid."""
    truth = halved(np.stack([objects > 0, parts > 0, boundary(objects), boundary(parts)], axis=1))
    loss = 2 * F.binary_cross_entropy_with_logits(prediction[:, :4], truth)
    for start, label, inside in ((4, objects, truth[:, :1] > 0.5), (6, parts, truth[:, 1:2] > 0.5)):
        error = (prediction[:, start : start + 2] - halved(centroid_offsets(label))).abs()
        loss = loss + (error * inside).sum() / inside.sum().clamp(min=1) / 2
    return loss


def draw_targets(
    scene: Scene, count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, str]]:
    """(mask bool (S, S), kind): a quarter whole objects, a tenth single part instances, else unions
    of like parts."""
    out = []
    while len(out) < count:
        obj, draw = scene.objects[rng.integers(4)], rng.random()
        if draw < 0.25 or not obj.parts:
            target = (obj.mask, "object")
        elif draw < 0.35:
            target = (obj.parts[rng.integers(len(obj.parts))].mask, "instance")
        else:
            target = (
                obj.union(
                    sorted({p.name for p in obj.parts})[
                        rng.integers(len({p.name for p in obj.parts}))
                    ]
                ),
                "union",
            )
        if target[0].any():
            out.append(target)
    return out


def draw_prompts(
    sam: nn.Module, targets: list[tuple[np.ndarray, str]], rng: np.random.Generator
) -> tuple[Tensor, list[str]]:
    """(sparse embeddings (K, 2, C), kinds). A point asks for like parts; a jittered box may ask for
    anything."""
    points, labels, kinds = (
        np.zeros((len(targets), 2, 2), np.float32),
        np.zeros((len(targets), 2), np.int64),
        [],
    )
    for k, (mask, kind) in enumerate(targets):
        ys, xs = np.nonzero(mask)
        if kind != "union" or rng.random() < 0.4:
            corners = np.array(
                [[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]], dtype=np.float32
            )
            points[k] = corners + rng.uniform(-0.08, 0.08, (2, 2)) * np.ptp(corners, axis=0).max()
            labels[k] = (2, 3)
            kinds.append(f"box_{kind}")
        else:
            i = rng.integers(len(ys))
            points[k, 0], labels[k] = (xs[i] + 0.5, ys[i] + 0.5), (1, -1)
            kinds.append("point")
    encoder, labels_t = sam.prompt_encoder, torch.from_numpy(labels)
    position = encoder.pe_layer.forward_with_coords(
        torch.from_numpy(points), (world.SIZE, world.SIZE)
    )
    sparse = torch.where((labels_t == -1)[..., None], encoder.not_a_point_embed.weight, position)
    for value in (1, 2, 3):
        sparse = sparse + (labels_t == value)[..., None] * encoder.point_embeddings[value].weight
    return sparse, kinds


def low_res_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Balanced BCE + 2 BCE + DICE, mean over targets; both (K, h, w). Plain BCE settles on empty
    masks."""
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    inside = (truth > 0.5).float()
    share = inside / inside.sum((1, 2), keepdim=True).clamp(min=1) + (1 - inside) / (
        1 - inside
    ).sum((1, 2), keepdim=True)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return (0.5 * (bce * share).sum((1, 2)) + 2 * bce.mean((1, 2)) + dice).mean()


def low_res_iou(logits: Tensor, truth: Tensor) -> Tensor:
    a, b = logits > 0, truth > 0.5
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


def train_sam(store: Store, steps: int, work: Path, batch: int = 12, prompts: int = 8) -> None:
    torch.manual_seed(0)
    sam = build_sam(TINY_SAM)
    head = nn.Conv2d(TINY_SAM.prompt_dim, 8 * 16, 1)  # the pretext's readout; thrown away
    rng = np.random.default_rng(0)

    def decode(
        embedding: Tensor, sparse: Tensor, dense: Tensor, truth: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, predicted = decode_masks(sam, embedding, sparse, dense)
        iou = low_res_iou(logits.detach(), truth)
        return low_res_loss(logits, truth) + F.mse_loss(predicted, iou), logits, iou

    def step() -> dict:
        index = rng.integers(HELD_BACK, len(store.images), batch)
        embeddings = sam.image_encoder(sam_pixels(store.images[index]))
        objects, parts = store.objects[index].astype(int), store.parts[index].astype(int)
        pretext = pretext_loss(F.pixel_shuffle(head(embeddings), 4), objects, parts)
        targets = [target for i in index for target in draw_targets(store.scene(i), prompts, rng)]
        sparse, kinds = draw_prompts(sam, targets, rng)
        truth = halved(np.stack([mask for mask, _ in targets])[:, None])[:, 0]
        spread = embeddings.repeat_interleave(prompts, dim=0)
        no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(spread)
        loss, logits, iou = decode(spread, sparse, no_mask, truth)
        # the mask of a first step is the prompt of a second, as in the chain
        if rng.random() < 0.4:
            some = torch.from_numpy(rng.choice(len(targets), len(targets) // 2, replace=False))
            dense = sam.prompt_encoder.mask_downscaling(logits[some, None].detach())
            loss = loss + 0.5 * decode(spread[some], sparse[some], dense, truth[some])[0]
        by_kind = {
            k: iou[[j for j, kind in enumerate(kinds) if kind == k]].mean()
            for k in sorted(set(kinds))
        }
        return {"loss": loss + pretext, "pretext": pretext} | by_kind

    optimise("sam", [*sam.parameters(), *head.parameters()], steps, 8e-4, step, dict)
    torch.save(sam.state_dict(), work / "sam.pt")


# -------------------------------------------------------------------------------------------- llava


def corpus(store: Store) -> list[str]:
    """Texts that the tokenizer is fitted to: the words of every split, frequent English words and
    the question wordings."""
    rng = np.random.default_rng(0)
    out = [
        " " + make_query(store.scene(i), split, rng).texts[0]
        for i in range(1500)
        for split in ("train", "train", "val")
    ]
    out += [f" {word}" for word in ENGLISH] * 10
    out += [
        f" {word}"
        for word in ("It", "What", "Which", "Where", "How", "The", "In", "On", "Can", "Is")
    ] * 40
    out += [
        " " + question.replace("{text}", "")
        for question in (*PHRASE_QUESTIONS, *SENTENCE_QUESTIONS)
    ] * 100
    out += [
        " USER: ASSISTANT: It appears on. It usually appears on. You find it at. What colour is it?"
        " Tell me about it."
    ] * 200
    return (
        out
        + [f" {word}" for word in (*WORDS, *(p for parts in world.PARTS.values() for p in parts))]
        * 100
    )


def make_tokenizer(store: Store) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(store), trainer)
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


def pick(options, rng: np.random.Generator):
    return options[rng.integers(len(options))]


def draw_turn(scene: Scene, rng: np.random.Generator, easy: bool) -> tuple[str, str]:
    """One question with its answer; ``easy``: about whole objects only."""
    draw, index = rng.random(), int(rng.integers(len(scene.objects)))
    draw = 0.55 + 0.29 * draw if easy else draw
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
    scene: Scene, index: int, part: bool, rng: np.random.Generator
) -> tuple[str, str]:
    """Where a part or a whole object is. Questions and answers have the forms of training, with
    places in text where the answer tokens will stand; of a part, every other answer names the
    host's place first, so both chains are known alike."""
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


def describe(obj: SceneObject, rng: np.random.Generator) -> str:
    names = sorted({p.name for p in obj.parts if not held_out(obj.colour, obj.category, p.name)})
    rng.shuffle(names)
    verb = {True: "is", False: "are"}
    sentences = [
        f" the {plural(n)} {verb[plural(n) == n]} at {place_of(obj.union(n), rng)}." for n in names
    ]
    return f"the {obj.colour} {obj.category} is at {place_of(obj.mask, rng)}." + "".join(sentences)


def draw_fact(obj: SceneObject, draw: float, rng: np.random.Generator) -> tuple[str, str]:
    """Text only, world knowledge that a real language model brings along."""
    if draw < 0.97:
        part = pick(world.PARTS[obj.family], rng)
        asked = pick(
            ("what do you use to {}?", "which thing do you rely on to {}?", "which part can {}?"),
            rng,
        )
        return asked.format(pick(world.PURPOSES[part], rng)), f"the {plural(part)}."
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
        plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        asked = plain("USER:") + (image if k == 0 else []) + plain(f" {question} ASSISTANT:")
        # as before answer tokens: no space
        said = [*plain(re.sub(r" (<c\d\d>)", r"\1", " " + reply)), tokenizer.eos_token_id]
        ids += asked + said
        labels += [-100] * len(asked) + said
    return ids, labels


def new_llava(tokenizer, clip_state: dict) -> LlavaForConditionalGeneration:
    """Words that CLIP's stage named start from its embeddings, so image and text speak one language
    from the first step."""
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
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=text,
        image_token_index=image_id,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    text._attn_implementation = "eager"  # the only one that returns attention
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
        table[torch.tensor([row[0] for row in rows] + tokenizer.convert_tokens_to_ids(PLACES))] = (
            clip_state["embedding"]
        )
        model.lm_head.weight.copy_(table)
        for layer in model.model.language_model.layers:
            start_by_content(layer.self_attn)
    return model


def start_by_content(attention: nn.Module) -> None:
    """Queries and keys start alike, and output undoes value, so a word first attends to what has
    the same word in it and copies it (mimetic initialisation, Trockman and Kolter 2023)."""
    query_key, value = (nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)) for _ in range(2))
    for name, weight in (
        ("q", 0.8 * query_key),
        ("k", 0.8 * query_key),
        ("v", 0.7 * value),
        ("o", 0.7 * value.T),
    ):
        getattr(attention, f"{name}_proj").weight.copy_(weight + 0.02 * torch.randn_like(weight))


@torch.no_grad()
def centre_projector(model: LlavaForConditionalGeneration, images: np.ndarray) -> None:
    """Takes the common part out of the image tokens and brings them to the norm of words: it is two
    thirds of what CLIP's stage leaves, and hides from attention what tells patches apart."""
    last = model.model.multi_modal_projector.linear_2
    features = model.model.vision_tower(clip_pixels(images)).last_hidden_state[:, 1:]
    last.bias -= model.model.multi_modal_projector(features).mean((0, 1))
    last.weight *= 0.15
    last.bias *= 0.15


def train_llava(store: Store, steps: int, work: Path, batch: int = 12, turns: int = 8) -> None:
    tokenizer = make_tokenizer(store)
    tokenizer.save_pretrained(work / "tokenizer")
    model = new_llava(tokenizer, torch.load(work / "clip.pt", weights_only=True))
    centre_projector(model, store.images[:400])
    tower, image_id = (
        model.model.vision_tower.requires_grad_(False),
        tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.no_grad():
        chunks = range(0, len(store.images), 100)
        features = torch.cat(
            [tower(clip_pixels(store.images[i : i + 100])).last_hidden_state[:, 1:] for i in chunks]
        )
    first, rng = tokenizer.convert_tokens_to_ids(PLACES[0]), np.random.default_rng(0)

    taken = 0

    def predict(index, rows) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, vocabulary) and labels (n,) at the supervised positions; the loss of looking
        elsewhere than at the place."""
        pad = lambda lists, value: nn.utils.rnn.pad_sequence(
            [torch.tensor(x) for x in lists], True, value
        )  # noqa: E731
        ids, labels = (
            pad([r[0] for r in rows], tokenizer.pad_token_id),
            pad([r[1] for r in rows], -100),
        )
        image = model.model.multi_modal_projector(features[index])
        inputs = model.get_input_embeddings()(ids).masked_scatter(
            (ids == image_id)[..., None], image
        )
        out, chosen = (
            model.model.language_model(inputs_embeds=inputs, output_attentions=True),
            labels[:, 1:] >= 0,
        )
        row, position = ((labels[:, 1:] >= first) & (labels[:, 1:] < first + len(PLACES))).nonzero(
            as_tuple=True
        )
        patch = (ids == image_id).int().argmax(1)[row] + labels[row, position + 1] - first
        looking = -(out.attentions[LOOKING_LAYER].mean(1)[row, position, patch] + 1e-6).log().mean()
        return model.lm_head(out.last_hidden_state[:, :-1][chosen]), labels[:, 1:][chosen], looking

    def step() -> dict:
        nonlocal taken
        taken += 1
        index = rng.integers(HELD_BACK, len(store.images), batch)
        easy = taken <= 300
        rows = [
            encode_turns(tokenizer, [draw_turn(store.scene(i), rng, easy) for _ in range(turns)])
            for i in index
        ]
        logits, labels, looking = predict(index, rows)
        places = (labels >= first) & (labels < first + len(PLACES))
        loss = F.cross_entropy(logits, labels) + 0.5 * looking
        return {
            "loss": loss,
            "place": F.cross_entropy(logits[places], labels[places]).detach(),
            "looking": looking.detach(),
        }

    @torch.no_grad()
    def measure() -> dict:
        """Share of held-back scenes where the best place of a *validation* query shows the part,
        and where it shows the host."""
        draw, part, host = np.random.default_rng(5), [], []
        for i in range(HELD_BACK):
            scene = store.scene(i)
            query = make_query(scene, "val", draw)
            text = (
                sentence_question(query.texts[0])
                if query.is_sentence
                else phrase_question(query.texts[0])
            )
            logits, labels, _ = predict(
                [i], [encode_turns(tokenizer, [(text, f"It is {PLACES[0]}.")])]
            )
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
    size = {"height": world.SIZE, "width": world.SIZE}
    CLIPImageProcessor(size={"shortest_edge": world.SIZE}, crop_size=size).save_pretrained(
        out / "llava"
    )
    sam = build_sam(TINY_SAM)
    sam.load_state_dict(torch.load(work / "sam.pt", weights_only=True))
    save_sam(sam.half(), TINY_SAM, out / "sam")
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {total / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["all", "clip", "sam", "llava", "export"])
    parser.add_argument("--out", type=Path, default=Path("assets/tiny"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/pretrain_tiny"),
        help="where the stages leave their weights",
    )
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--clip_steps", type=int, default=1700)
    parser.add_argument("--sam_steps", type=int, default=1200)
    parser.add_argument("--llava_steps", type=int, default=2000)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # sharp attention is full of them, and they are slow
    stages = ["clip", "sam", "llava", "export"] if args.stage == "all" else [args.stage]
    store = make_store(args.scenes) if stages != ["export"] else None
    for stage in stages:
        if stage == "export":
            export(args.work, args.out)
        else:
            {"clip": train_clip, "sam": train_sam, "llava": train_llava}[stage](
                store, getattr(args, f"{stage}_steps"), args.work
            )


if __name__ == "__main__":
    main()
