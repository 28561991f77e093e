"""Parity of whole models: forward, losses, gradients, LoRA and free generation against recorded
runs.

B images · N conversations · K targets · T levels; names as in docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import CLIPVisionConfig

from cores.dataset.collate import Batch
from cores.model.checkpoints import published
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.processor import CoresProcessor
from cores.model.reasoning.lora import add_lora, load_adapter
from cores.model.segmenting.frames import to_original
from cores.model.segmenting.sam import mask_prompt, no_mask_prompt
from cores.model.trainable import set_trainable
from tests.parity.table import LOSS_TOLERANCE, Table, added_tokens, read_json, read_tensors

GRADIENT_FLOOR = 1e-4  # of the largest norm: what is zero in exact arithmetic is noise of that size
# noise of gradient norms where noise.json has none, relative: what the recorded ones show
UNRECORDED_NORM = 2e-5
LOSSES = {"ce_loss": "text", "mask_bce_loss": "bce", "mask_dice_loss": "dice"}


def compare(folder: Path, table: Table) -> None:
    """Every recorded run of a model case."""
    case = Case(folder, table)
    with tempfile.TemporaryDirectory(prefix="cores-parity-") as checkpoint:
        write_checkpoint(folder, case.config, Path(checkpoint))
        processor = CoresProcessor.from_pretrained(checkpoint)
        model = CoresForReasoningSegmentation.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()
    case.prepare(model, processor)
    case.compare_images()
    for run in case.runs():
        case.compare_run(run)
    case.compare_generations()
    case.compare_lora()
    for name in sorted(case.outputs.keys() - case.seen):
        table.left_out[name] = "this program has nothing to compare it with"


def write_checkpoint(case: Path, config: dict, folder: Path) -> None:
    """The case as a published checkpoint folder: config.json, weights, tokenizer, and the sizes of
    its CLIP beside it."""
    llama, clip = config["llama"], config["clip"]
    content = {
        "architectures": ["LISAForCausalLM" if config["repo"] == "LISA" else "CORESForCausalLM"],
        "model_type": "llava",
        "hidden_size": llama["hidden"],
        "intermediate_size": llama["inter"],
        "num_hidden_layers": llama["layers"],
        "num_attention_heads": llama["heads"],
        "num_key_value_heads": llama["kv_heads"],
        "hidden_act": llama["act"],
        "rms_norm_eps": llama["eps"],
        "rope_theta": llama["rope_theta"],
        "max_position_embeddings": llama["max_position"],
        "bos_token_id": config["bos"],
        "eos_token_id": config["eos"],
        "pad_token_id": config["pad"],
        "mm_vision_tower": "clip",
        "mm_projector_type": config.get("mm_projector_type", "linear"),
        "mm_vision_select_layer": clip["select_layer"],
        "mm_vision_select_feature": clip["select_feature"],
        "mm_use_im_start_end": config["mm_use_im_start_end"],
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "model.safetensors").symlink_to((case / "weights.safetensors").resolve())
    shutil.copy(case / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps(added_tokens(config)))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "legacy": True,
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"bos_token": "<s>", "eos_token": "</s>"})
    )
    CLIPVisionConfig(
        hidden_size=clip["hidden"],
        intermediate_size=clip["inter"],
        num_hidden_layers=clip["layers"],
        num_attention_heads=clip["heads"],
        image_size=clip["image"],
        patch_size=clip["patch"],
        hidden_act=clip["act"],
        layer_norm_eps=clip["eps"],
    ).save_pretrained(folder / "clip")


class Case:
    """Recorded inputs and outputs of one model, and the model."""

    def __init__(self, folder: Path, table: Table):
        self.folder, self.table = folder, table
        self.config = read_json(folder / "config.json")
        self.meta = read_json(folder / "meta.json")
        self.inputs = read_tensors(folder / "inputs.safetensors")
        self.outputs = read_tensors(folder / "outputs.safetensors")
        self.seen: set[str] = set()
        self.images = sum(name.endswith(".orig_u8_hwc") for name in self.inputs)

    def prepare(self, model: CoresForReasoningSegmentation, processor: CoresProcessor) -> None:
        self.model, self.processor = model, processor
        weights = self.config["loss_weights"]
        model.config.text_weight, model.config.bce_weight, model.config.dice_weight = (
            weights[k] for k in ("ce", "bce", "dice")
        )
        # that variant doubles its mask losses
        model.config.mask_weight = 2.0 if self.stage_major else 1.0
        model.config.ignore_in_loss = False
        self.originals = [self.inputs[f"image{i}.orig_u8_hwc"].numpy() for i in range(self.images)]
        self.clip = [processor.clip(image) for image in self.originals]
        self.sam = [processor.sam(image) for image in self.originals]

    @property
    def levels(self) -> int:
        return len(self.model.config.levels)

    @property
    def stage_major(self) -> bool:
        """Whether recorded lists hold all images of level 0 first; else all levels of image 0
        first."""
        return self.config["module"].endswith("2seg2mask")

    # ------------------------------------------------------------------------------------- recorded

    def theirs(self, name: str) -> tuple[Tensor, int] | None:
        """A recorded tensor and its step: 1, or every n-th value of the flattened tensor. None
        where not recorded."""
        if name in self.outputs:
            self.seen.add(name)
            return self.outputs[name], 1
        if f"{name}.sample" in self.outputs:
            self.seen.add(f"{name}.sample")
            return self.outputs[f"{name}.sample"], self.meta["sampled"][name]["step"]
        return None

    def check(self, name: str, ours: Tensor | None, tolerance: float | None = None) -> None:
        """Compares where recorded."""
        recorded = self.theirs(name)
        if recorded is None or ours is None:
            return
        theirs, step = recorded
        key = name
        if step > 1:
            ours, key = ours.flatten()[::step], f"{name}.sample"
            if name in self.table.noise:
                self.table.noise.setdefault(key, self.table.noise[name])
        if theirs.dtype in (torch.uint8, torch.int64, torch.bool):
            self.table.equal(key, ours.to(theirs.dtype), theirs)
        else:
            self.table.tensors(key, ours.float(), theirs, tolerance)

    def runs(self) -> list[str]:
        """Teacher-forced runs, by their recorded inputs."""
        names = sorted({name.split(".")[0] for name in self.inputs if name.endswith(".labels")})
        if "train_vqa_first" in names and self.stage_major:
            self.table.left_out["train_vqa_first"] = (
                "the published code pools from the wrong image there"
            )
            names.remove("train_vqa_first")
            self.seen |= {name for name in self.outputs if name.startswith("train_vqa_first.")}
        return names

    # --------------------------------------------------------------------------------------- inputs

    def image_numbers(self, run: str) -> list[int]:
        """The images of a run: ``infer1`` is about image 1, others about the first ones."""
        count = len(self.inputs[f"{run}.offset"]) - 1
        digits = run.removeprefix("infer")
        return (
            [int(digits)]
            if run != digits and digits.isdigit() and count == 1
            else list(range(count))
        )

    def expand(self, ids: Tensor, fill: int) -> Tensor:
        """Rows with the one image placeholder (-200) repeated as often as there are image features,
        as ``fill``."""
        count = self.processor.image_token_count
        rows = []
        for row in ids:
            place = int((row == self.config["image_token_index"]).nonzero()[0, 0])
            rows.append(torch.cat([row[:place], row.new_full((count,), fill), row[place + 1 :]]))
        return torch.stack(rows)

    def batch(self, run: str) -> Batch:
        """A teacher-forced run. What is recorded has one placeholder for each image."""
        ids, labels, mask = (
            self.inputs[f"{run}.{name}"] for name in ("input_ids", "labels", "attention_masks")
        )
        place = ids == self.config["image_token_index"]
        labels = self.expand(torch.where(place, ids, labels), -100)
        offset = self.inputs[f"{run}.offset"]
        counts = offset.diff()
        return self.batch_of(
            run,
            self.image_numbers(run),
            self.expand(ids, self.model.reasoning.image_token_id),
            image_index=torch.arange(len(counts)).repeat_interleave(counts),
            attention_mask=self.expand(torch.where(place, ids, mask), 1),
            labels=labels,
            target_masks=self.masks_by_row(run, labels, counts.tolist()),
        )

    def prompt_batch(self, prompt: Tensor) -> Batch:
        """A prompt about the first image."""
        ids = self.expand(prompt, self.model.reasoning.image_token_id)
        return self.batch_of(
            "eval",
            [0],
            ids,
            image_index=torch.zeros(1, dtype=torch.int64),
            attention_mask=torch.ones_like(ids),
            labels=torch.full_like(ids, -100),
            target_masks=[torch.zeros((0, *self.originals[0].shape[:2]), dtype=torch.bool)],
        )

    def batch_of(self, name: str, images: list[int], ids: Tensor, **fields: Any) -> Batch:
        """``ids`` (N, L) about the recorded ``images``, with further fields of a Batch."""
        return Batch(
            input_ids=ids,
            clip_pixels=torch.stack([self.clip[i] for i in images]),
            sam_pixels=torch.stack([self.sam[i][0] for i in images]),
            original_sizes=[self.originals[i].shape[:2] for i in images],
            resized_sizes=[self.sam[i][1] for i in images],
            ignore_masks=[None] * len(ids),
            host_masks=[None] * len(ids),
            info=[
                {"dataset": name, "id": str(row), "image_path": "recorded"}
                for row in range(len(ids))
            ],
            **fields,
        )

    def masks_by_row(self, run: str, labels: Tensor, counts: list[int]) -> list[Tensor]:
        """The targets of every conversation: recorded per image, in the order of their tokens."""
        last = self.model.config.level_token_ids[-1]
        per_row = (labels == last).sum(1).tolist()
        masks, row = [], 0
        for image, count in enumerate(counts):
            stack = self.inputs[f"{run}.masks.{image}"].bool()
            masks += stack.split(per_row[row : row + count])
            row += count
        return masks

    # ---------------------------------------------------------------------------------- comparisons

    def compare_images(self) -> None:
        for i in range(self.images):
            self.check(f"image{i}.sam_input", self.sam[i][0])
            self.table.tensors(
                f"image{i}.clip (input)", self.clip[i], self.inputs[f"image{i}.clip"]
            )

    def compare_run(self, run: str) -> None:
        """Values inside one teacher-forced pass, its losses, masks and gradients."""
        batch = self.batch(run)
        training = f"{run}.loss" in self.outputs
        if training:
            set_trainable(self.model, lora=False)
        with Probe(self.model) as probe, torch.set_grad_enabled(training):
            output = self.model(batch)
        self.compare_inside(run, batch, probe, output)
        if training:
            self.compare_losses(run, output)
            self.compare_gradients(run, output.loss)
        else:
            self.compare_masks(run, batch, output.low_res)
        if f"{run}_constinit.loss" in self.outputs:
            self.compare_constant_refiner(run, batch)

    def compare_inside(self, run: str, batch: Batch, probe: Probe, output) -> None:
        counts = [len(masks) for masks in output.low_res]
        per_image = image_slices(batch, counts)
        vision = {
            "clip_feature": probe.all("clip"),
            "mm_projected": probe.all("projected"),
            "sam_image_embedding": probe.all("sam_embeddings"),
        }
        for i in range(len(per_image)):
            for name, values in vision.items():
                if values is not None:
                    one = values[i : i + 1] if name == "sam_image_embedding" else values[i]
                    self.check(f"{run}.{name}.{i}", one)
        # read again row by row: the pass itself shares prefixes and computes only what the losses
        # need
        reasoning = self.model.reasoning
        with torch.no_grad():
            features = reasoning.image_features(batch.clip_pixels)
            embeddings = reasoning.embed(batch.input_ids, features, batch.image_index)
            hidden = reasoning.hidden_states(embeddings, batch.attention_mask)
        self.check(f"{run}.llm_inputs_embeds", embeddings)
        self.check(f"{run}.last_hidden_state", hidden)
        self.check(f"{run}.llm_labels", batch.labels)
        self.check(f"{run}.llm_attention_mask", self.recorded_attention(run))
        supervised = batch.labels[:, 1:] >= 0
        logits = reasoning.llava.lm_head(hidden[:, :-1][supervised])
        self.check(f"{run}.logits_at_supervised", logits)
        self.check(f"{run}.supervised_targets", batch.labels[:, 1:][supervised])
        if f"{run}.prompt_text_embeds.0" in self.outputs:
            self.compare_prompts(run, probe, output, per_image)

    def recorded_attention(self, run: str) -> Tensor:
        """The published attention mask: the added columns stand on the left, wherever the image
        is."""
        mask = self.inputs[f"{run}.attention_masks"]
        added = self.processor.image_token_count - 1
        return torch.cat([mask.new_ones((len(mask), added)), mask], dim=1)

    def compare_prompts(self, run: str, probe: Probe, output, per_image: list[slice]) -> None:
        low_res, iou = torch.cat(output.low_res), torch.cat(output.iou)
        tokens, refined = probe.first("tokens"), probe.values["refined"]
        query, memory = probe.first("query"), probe.first("memory")
        for level, name in enumerate(self.level_names()):
            self.check(f"{run}.pred_embeddings[{name}]", tokens[:, level])
            sparse = refined[level - 1] if level and refined else tokens[:, level]
            for image, rows in enumerate(per_image):
                k = self.position(image, level, len(per_image))
                original = self.batch_sizes(run)[image]
                self.check(f"{run}.prompt_text_embeds.{k}", tokens[rows, level][:, None])
                self.check(f"{run}.low_res_masks.{k}", low_res[rows, level][:, None])
                self.check(f"{run}.iou_pred.{k}", iou[rows, level][:, None])
                self.check(
                    f"{run}.postprocess_out.{k}",
                    self.full(low_res[rows, level], *original)[:, None],
                )
                self.check(f"{run}.decoder_sparse_in.{k}", sparse[rows][:, None])
                self.check(f"{run}.prompt_dense.{k}", self.dense(low_res, level, rows))
                if level and refined:
                    self.check(f"{run}.refiner_tgt.{image}", query[rows].transpose(0, 1))
                    self.check(f"{run}.refiner_memory.{image}", memory[rows].transpose(0, 1))
                    added = refined[0][rows] - tokens[rows, level]
                    self.check(f"{run}.refiner_out.{image}", added[None])

    def dense(self, low_res: Tensor, level: int, rows: slice) -> Tensor:
        """The dense prompt of a level: the mask of the level before, or SAM's "no mask"."""
        sam = self.model.segmenting.sam
        masks = low_res[rows]
        return mask_prompt(sam, masks[:, level - 1]) if level else no_mask_prompt(sam, len(masks))

    def batch_sizes(self, run: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        return [
            (self.sam[i][1], tuple(self.originals[i].shape[:2])) for i in self.image_numbers(run)
        ]

    def full(self, low_res: Tensor, resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
        return to_original(low_res, resized, original, self.model.config.sam["image_size"])

    def level_names(self) -> list[str]:
        return ["seg_token_idx"] if self.levels == 1 else ["seg_sema_token_idx", "seg_token_idx"]

    def position(self, image: int, level: int, images: int) -> int:
        return level * images + image if self.stage_major else image * self.levels + level

    def compare_losses(self, run: str, output) -> None:
        c = self.model.config
        weights = {
            "text": c.text_weight,
            "bce": c.mask_weight * c.bce_weight,
            "dice": c.mask_weight * c.dice_weight,
        }
        for theirs, ours in LOSSES.items():
            self.check(f"{run}.{theirs}", weights[ours] * output.losses[ours], LOSS_TOLERANCE)
        self.check(f"{run}.loss", output.loss, LOSS_TOLERANCE)
        mask = sum(weights[name] * output.losses[name] for name in ("bce", "dice"))
        self.check(f"{run}.mask_loss", mask, LOSS_TOLERANCE)

    def compare_gradients(self, run: str, loss: Tensor) -> None:
        """Whole gradients where recorded, norms of all the others."""
        self.model.zero_grad()
        loss.backward()
        own = {name: p.grad for name, p in self.model.named_parameters()}
        linear = published.has_linear_projector(self.model.config.llava)
        recorded = self.meta["grad_norms"].get(run, {})
        largest = max(recorded.values(), default=0.0)
        allowed = self.table.factor * self.table.noise.get(f"grad_norms.{run}", UNRECORDED_NORM)
        worst, worst_name = 0.0, "none recorded"
        for name, theirs in recorded.items():
            ours = own[published.our_name(name.removeprefix("base_model.model."), linear)]
            norm = 0.0 if ours is None else ours.float().norm().item()
            error = abs(norm - theirs) / max(theirs, GRADIENT_FLOOR * largest)
            worst, worst_name = max((worst, worst_name), (error, name))
            self.check(f"{run}.grad.{name}", ours)
        if recorded:
            self.table.add(f"{run}.grad_norms, relative; worst {worst_name}", worst, allowed + 1e-5)
        self.model.zero_grad()

    def compare_masks(self, run: str, batch: Batch, low_res: list[Tensor]) -> None:
        """Logits in the original frame, and their pixels above 0."""
        for image, rows in enumerate(image_slices(batch, [len(m) for m in low_res])):
            logits = self.full(
                torch.cat(low_res)[rows, -1],
                batch.resized_sizes[image],
                batch.original_sizes[image],
            )
            self.compare_mask(f"{run}.pred_masks.{image}", logits)

    def compare_mask(self, name: str, logits: Tensor) -> None:
        """Logits, and the pixels above 0. A recorded logit inside the noise floor is undecided: no
        sign can be asked of it."""
        self.check(name, logits)
        recorded = self.theirs(name)
        if recorded is None:
            return
        theirs, step = recorded
        ours, theirs = logits.flatten()[::step], theirs.flatten()
        if len(ours) != len(theirs):
            return  # said above
        decided = theirs.abs() > self.table.floor(name, theirs)
        flipped = ((ours > 0) != (theirs > 0)) & decided
        self.table.add(
            f"{name} > 0",
            flipped.sum(),
            0,
            f"pixels, {int((~decided).sum())} of {len(theirs)} undecided",
        )

    def compare_constant_refiner(self, run: str, batch: Batch) -> None:
        """The refiner as the published training script leaves it: weights 1, biases 0. Losses
        only."""
        refiner = self.model.segmenting.refiner
        kept = {name: tensor.clone() for name, tensor in refiner.state_dict().items()}
        with torch.no_grad():
            for name, parameter in refiner.named_parameters():
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            self.compare_losses(f"{run}_constinit", self.model(batch))
        refiner.load_state_dict(kept)
        recorded = {name for name in self.outputs if "_constinit." in name}
        self.table.left_out["*_constinit.*"] = (
            "compared in losses only: its LayerNorm amplifies rounding"
        )
        self.seen |= recorded

    # ------------------------------------------------------------------------------ free generation

    def compare_generations(self) -> None:
        for name in sorted(self.outputs):
            run, _, kind = name.partition(".")
            if kind == "output_ids":
                # the published evaluate() has none in any variant
                without_refiner = self.levels > 1
                with self.refiner_off() if without_refiner else contextlib.nullcontext():
                    self.compare_generation(run)

    @contextlib.contextmanager
    def refiner_off(self) -> Iterator[None]:
        kept, self.model.segmenting.refiner = self.model.segmenting.refiner, None
        try:
            yield
        finally:
            self.model.segmenting.refiner = kept

    def compare_generation(self, run: str) -> None:
        prompt = self.inputs.get(f"{run}.input_ids", self.inputs.get("eval.input_ids"))
        if prompt is None:
            raise KeyError(f"{run}.input_ids")
        recorded = self.outputs[f"{run}.output_ids"]
        new = recorded.shape[1] - prompt.shape[1]
        stops = int(recorded[0, -1]) == self.config["eos"]
        batch = self.prompt_batch(prompt)
        with Probe(self.model) as probe, torch.no_grad():
            answer = self.model.generate(
                batch, self.processor.tokenizer, max_new_tokens=max(32, new) if stops else new
            )[0]
            ids = torch.tensor([answer.token_ids + [self.config["eos"]] * stops])
            self.check(f"{run}.output_ids", torch.cat([prompt, ids], dim=1))
            self.compare_answer_masks(run, probe)
            full = self.expand(recorded[:, :-1], self.model.reasoning.image_token_id)
            features = self.model.reasoning.image_features(batch.clip_pixels)
            embeddings = self.model.reasoning.embed(full, features, batch.image_index)
            self.check(
                f"{run}.last_hidden_state",
                self.model.reasoning.hidden_states(embeddings, torch.ones_like(full)),
            )

    def compare_answer_masks(self, run: str, probe: Probe) -> None:
        """Tokens and masks of a free answer; none where it has no tokens."""
        levels, tokens = (
            probe.low_res or [torch.zeros((0, 1, 1))] * self.levels,
            probe.first("tokens"),
        )
        for level in range(self.levels if tokens is not None else 0):
            self.check(f"{run}.prompt_text_embeds.{level}", tokens[:, level][:, None])
            self.check(f"{run}.low_res_masks.{level}", levels[level][:, None])
        name, size = f"{run}.pred_masks.0", tuple(self.originals[0].shape[:2])
        if len(levels[-1]):
            self.compare_mask(name, self.full(levels[-1], self.sam[0][1], size))
        else:
            self.check(name, torch.zeros((0, *size)))

    # ----------------------------------------------------------------------------------------- LoRA

    def compare_lora(self) -> None:
        """Last, as it changes the model."""
        file = self.folder / "lora.safetensors"
        runs = sorted({key.split(".")[0] for key in self.outputs if key.startswith("lora_")})
        if not runs:
            return
        settings = self.meta["lora"]
        layers = sorted({name.rsplit(".", 1)[-1] for name in settings["target_modules"]})
        add_lora(self.model, settings["r"], settings["alpha"], dropout=0.0, target_modules=layers)
        load_adapter(self.model, read_tensors(file), file)
        for name in runs:
            run = name.removeprefix("lora_")
            batch = self.batch(run)
            training = f"{name}.loss" in self.outputs
            if training:
                set_trainable(self.model)
            with torch.set_grad_enabled(training):
                output = self.model(batch)
            if training:
                self.compare_losses(name, output)
                self.compare_gradients(name, output.loss)
            else:
                self.compare_masks(name, batch, output.low_res)


class Probe:
    """Keeps what passes between the modules of a model while it is active."""

    def __init__(self, model: CoresForReasoningSegmentation):
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        llava, segmenting = model.reasoning.llava.model, model.segmenting
        self.hooks = [
            self._watch(llava.multi_modal_projector, clip=0, projected=None),
            self._watch(model.text_projection, tokens=None),
            self._watch(segmenting.sam.image_encoder, sam_embeddings=None),
            self._watch(segmenting, masks=None),
        ]
        if segmenting.refiner is not None:
            self.hooks.append(self._watch(segmenting.refiner, refined=None))
            self.hooks.append(self._watch(segmenting.refiner.attention, query=0, memory=1))

    def _watch(self, module: nn.Module, **places: int | None) -> RemovableHandle:
        """Keeps the module's argument at each of ``places``, None for what it returns (the first of
        several things)."""

        def hook(_: nn.Module, args: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
            result = out[0] if isinstance(out, tuple) else out
            for name, place in places.items():
                self.values[name].append(result if place is None else args[place])

        return module.register_forward_hook(hook)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def first(self, name: str) -> Tensor | None:
        """Of the first call; None where there was none."""
        return next(iter(self.values[name]), None)

    def all(self, name: str) -> Tensor | None:
        """Of all calls, one after the other."""
        return torch.cat(self.values[name]) if self.values[name] else None

    @property
    def low_res(self) -> list[Tensor]:
        """Per level (K, h, w); empty where no mask was asked for."""
        masks = self.first("masks")
        return [] if masks is None else list(masks.unbind(1))


def image_slices(batch: Batch, counts: list[int]) -> list[slice]:
    """The targets of each image, as slices of the batch's K targets."""
    per_image = [0] * len(batch.original_sizes)
    for image, count in zip(batch.image_index.tolist(), counts, strict=True):
        per_image[image] += count
    starts = [sum(per_image[:i]) for i in range(len(per_image))]
    return [slice(start, start + count) for start, count in zip(starts, per_image, strict=True)]
