"""Checkpoints of language models and segmenters."""

import argparse
import json
import logging
import shutil
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cores import chat, train_ds
from cores.model.build import build_from_backbones
from cores.model.checkpoints import published
from cores.model.checkpoints.llava import load_llava
from cores.model.checkpoints.sam import load_sam
from cores.model.export import save_published
from tests.backbone_toys import flags, toys
from tests.faults.case import case


def finished(folder: Path, levels=("SEG",), merged: bool = False) -> Path:
    """A whole model in LISA's own layout, as its authors write it, or ``merged``, in ours."""
    model, processor = build_from_backbones(
        toys() / "llava", toys() / "sam", levels, template="tiny", exemplar_count=0
    )
    if merged:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        save_published(model, processor, folder)
        (folder / "cores_processor.json").unlink()
    return folder


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def their_llava(folder: Path, **fields) -> Path:
    """The toy LLaVA in the layout of LLaVA's authors."""
    finished(folder)
    weights = load_file(folder / "model.safetensors")
    masks = ("model.visual_model.", "model.text_hidden_fcs.")
    kept = {name: w for name, w in weights.items() if not name.startswith(masks)}
    save_file(kept, folder / "model.safetensors")  # Without metadata, as other tools write it.
    change_config(folder, architectures=["LlavaLlamaForCausalLM"], **fields)
    return folder


def train(root: Path, **changes) -> int:
    few = {"epochs": 1, "steps_per_epoch": 1, "no_eval": "true", "auto_resume": "false"}
    return train_ds.main(flags(toys(), log_base_dir=root / "runs", **(few | changes)))


def ask(root: Path, version: Path) -> int:
    cv2.imwrite(str(root / "a.png"), np.full((24, 32, 3), 90, dtype=np.uint8))
    answer = ["--prompt", "the bright thing", "--vis_save_path", str(root / "vis")]
    how = ["--conv_type", "tiny", "--precision", "fp32"]
    return chat.main(["--version", str(version), "--image", str(root / "a.png"), *answer, *how])


def said(run, *arguments, **changes) -> tuple[int, str]:
    """(exit code, what stands on stderr behind "error: ")."""
    import contextlib
    import io

    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        code = run(*arguments, **changes)
    return code, stream.getvalue().partition("error: ")[2]


@cache
def sam_weights() -> dict[str, torch.Tensor]:
    return load_file(toys() / "sam" / "sam.safetensors")


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: weight for name, weight in real_sam().items()}


@cache
def real_sam() -> dict[str, torch.Tensor]:
    """A small SAM with the eight heads of a decoder that a .pth has."""
    from cores.model.config import SamDims
    from cores.model.segmenting.sam import build_sam

    torch.manual_seed(2)
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "window_size": 0}
    return build_sam(
        SamDims(
            image_size=32,
            patch_size=8,
            global_attn_indexes=(),
            prompt_dim=16,
            decoder_mlp_dim=16,
            mask_in_chans=8,
            iou_head_hidden_dim=8,
            **sizes,
        )
    ).state_dict()


@case(
    given="LLaVA or LISA saved by today's LLaVA code (`model_type` llava_llama, `rope_parameters`,"
    " the tower's names of transformers 5)",
    outcome="right",
    now="loads with the same weights as under its old name",
)
def llava_llama(root: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    folder = their_llava(root / "llava", model_type="llava_llama", rope_parameters=rope)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    old = published.THEIR_TOWERS
    save_file({n.replace(*old): w for n, w in weights.items()}, folder / "model.safetensors")
    found = load_llava(folder).model
    assert found.config.text_config.rope_parameters["rope_theta"] == 5e5
    expected = load_llava(toys() / "llava").model.state_dict()
    for name, weight in found.state_dict().items():
        rows = len(expected[name])  # LISA's tokens have rows of their own behind them.
        assert torch.equal(weight[:rows], expected[name]), name
    lisa = finished(root / "lisa")
    wrapped = {f"module.{n}": w for n, w in load_file(lisa / "model.safetensors").items()}
    save_file(wrapped, lisa / "model.safetensors")  # As a run under DDP saves it.
    change_config(lisa, model_type="llava_llama")
    assert ask(root, lisa) in (0, 1), "0 and 1 are an answer with and without a mask"


@case(
    given="LLaVA's LoRA folder (adapter_config.json, non_lora_trainables.bin) as `--version`",
    outcome="refused",
    now="says of which base it is a LoRA and how to merge it",
)
def llava_lora(root: Path) -> None:
    folder = root / "llava-lora"
    folder.mkdir()
    for name, content in {
        "config.json": {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
        "adapter_config.json": {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "r": 128},
    }.items():
        (folder / name).write_text(json.dumps(content))
    for name in ("adapter_model.bin", "non_lora_trainables.bin"):
        torch.save({"a.b": torch.zeros(1)}, folder / name)
    for run in (lambda: train(root, version=folder), lambda: ask(root, folder)):
        code, line = said(run)
        assert code == 2 and "LoRA adapter of LLaVA's training on lmsys/vicuna-7b-v1.5" in line
        assert "merge_lora_weights.py" in line and line.count("\n") == 1
    (folder / "config.json").unlink()  # As PEFT writes one.
    code, line = said(ask, root, folder)
    assert code == 2 and "merge_and_unload" in line and "vicuna" in line


@case(
    given="a backbone, a run folder or a language model without vision given to `chat.py`",
    outcome="refused",
    now="says what it is and how to come by a model that answers",
)
def no_merged_model(root: Path) -> None:
    code, line = said(ask, root, toys() / "llava")
    assert code == 2 and "a backbone without masks; train with it" in line
    run = root / "run"
    (run / "ckpt" / "last").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    code, line = said(ask, root, run)
    assert code == 2 and f"--run {run}" in line and "merge it first" in line
    (root / "llama").mkdir()
    (root / "llama" / "config.json").write_text('{"model_type": "llama"}')
    code, line = said(ask, root, root / "llama")
    assert code == 2 and "this is 'llama'" in line


@case(
    given="a fine-tuned SAM as {'model': …}, {'state_dict': …} with its optimizer, with DDP's"
    " `module.`, Lightning's `model.`, torch.compile's `_orig_mod.`, or safetensors",
    outcome="right",
    now="the weights inside are used",
)
def wrapped_sam(root: Path) -> None:
    compiled = {
        name.replace("image_encoder.", "image_encoder._orig_mod."): weight
        for name, weight in real_sam().items()
    }
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    beside = {"optimizer": optimizer, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    files = {
        "model.pth": {"model": real_sam(), **beside},
        "ddp.pth": under("module."),
        "lightning.ckpt": {"state_dict": under("model."), "optimizer_states": [optimizer]},
        "net.pth": {"checkpoint": {"net": under("module.sam."), **beside}},
        "compiled.pth": compiled,
    }
    for name, content in files.items():
        torch.save(content, root / name)
    save_file(under("_orig_mod."), root / "plain.safetensors")
    for name in (*files, "plain.safetensors"):
        sam, _ = load_sam(root / name)
        assert all(torch.equal(w, real_sam()[n]) for n, w in sam.state_dict().items()), name
    assert train(root, vision_pretrained=root / "lightning.ckpt") == 0


@case(
    given="SAM-HQ, MobileSAM, SAM 2, transformers' SAM, a SAM with adapters, weights and their"
    " average in one file, a pickled module, a web page or a Git LFS pointer as a SAM",
    outcome="refused",
    now="one line says which of them it is",
)
def no_original_sam(root: Path) -> None:
    one = torch.zeros(2, 2)
    files = {
        "SAM-HQ": real_sam() | {"mask_decoder.hf_token.weight": one},
        "MobileSAM": {"image_encoder.layers.0.blocks.0.conv1.c.weight": one},
        "SAM 2": {"model": {"image_encoder.trunk.pos_embed": one}},
        "transformers' layout": {"vision_encoder.layers.0.attn.qkv.weight": one},
        "with adapters": real_sam() | {"image_encoder.blocks.0.Adapter.D_fc1.weight": one},
        "'ema', 'model'": {"model": real_sam(), "ema": real_sam()},
        "holds a torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
        "not the weights of a SAM": {"lm_head.weight": one},
    }
    for words, content in files.items():
        torch.save(content, root / "sam.pth")
        code, line = said(train, root, vision_pretrained=root / "sam.pth")
        assert code == 2 and words in line and "sam.pth" in line and line.count("\n") == 1, line
    for words, text in {
        "a web page": "<!DOCTYPE html>",
        "git lfs": "version https://git-lfs",
    }.items():
        (root / "sam.pth").write_text(text)
        code, line = said(train, root, vision_pretrained=root / "sam.pth")
        assert code == 2 and words in line, line


@case(
    given="a sam.json of another size (vit_h) beside the weights of a smaller SAM",
    outcome="refused",
    now="names the size in which they differ, before a model of that size is made",
)
def other_sam_size(root: Path) -> None:
    shutil.copytree(toys() / "sam", root / "sam")
    sizes = json.loads((root / "sam" / "sam.json").read_text()) | {"depth": 10**6}
    (root / "sam" / "sam.json").write_text(json.dumps(sizes))
    code, line = said(train, root, vision_pretrained=root / "sam")
    assert code == 2 and "depth 1000000, but the weights in sam.safetensors have 1" in line


@case(
    given="NaN or infinity in one weight of a LLaVA, a SAM or a merged model",
    outcome="refused",
    now="an error before the first step or answer, naming file and weight",
)
def non_finite_weight(root: Path) -> None:
    shutil.copytree(toys() / "llava", root / "llava")
    shutil.copytree(toys() / "sam", root / "sam")
    finished(root / "model", merged=True)
    for file, value in {
        root / "llava" / "model.safetensors": float("nan"),
        root / "sam" / "sam.safetensors": float("inf"),
        root / "model" / "model.safetensors": float("-inf"),
    }.items():
        weights = load_file(file)
        name = sorted(name for name, w in weights.items() if w.is_floating_point())[-1]
        weights[name].view(-1)[-1] = value
        save_file(weights, file, {"format": "pt"})
        if "model" in file.parts:
            code, line = said(ask, root, file.parent)
        else:
            flag = "version" if "llava" in file.parts else "vision_pretrained"
            code, line = said(train, root, **{flag: file.parent})
        assert code == 2 and f"{file}: not finite: {name} (NaN or infinity)" in line, line


@case(
    given="a model whose numbers overflow only while it computes, in an evaluation",
    outcome="refused",
    now="ends with one line that names the sample; no metrics are written",
)
def non_finite_answer(root: Path) -> None:
    finished(root / "model", ("LOC", "SEG"), merged=True)
    file = root / "model" / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("norm.weight") and "language_model" in name:
            weight.fill_(3e38)
    save_file(weights, file, {"format": "pt"})
    for mode in ("free", "teacher_forced"):
        how = {"eval_mode": mode, "no_eval": "false", "exp_name": mode}
        argv = flags(toys(), log_base_dir=root / "runs", version=root / "model", **how)
        code, line = said(train_ds.main, [*argv, "--eval_only"])
        assert code == 2 and "are not finite" in line and "Toy" in line, line
        assert not (root / "runs" / mode / "metrics.json").exists()


@case(
    given="JSON files of a model folder that hold null, [], a text, half an object or 100,000"
    " brackets, or fields of another type",
    outcome="refused",
    now="one line names the file",
)
def hostile_json(root: Path) -> None:
    folder = finished(root / "model", merged=True)
    logging.disable(logging.WARNING)
    try:
        for file in sorted(folder.glob("*.json")):
            whole = file.read_bytes()
            for body in (b"null", b"[]", b'"x"', b'{"a": ', b"[" * 100_000, b'{"a":' * 100_000):
                file.write_bytes(body)
                code, line = said(ask, root, folder)
                assert code == 2 and file.name in line and line.count("\n") == 1, (body[:9], line)
            file.write_bytes(whole)
        for name, fields in {
            "config.json": {"sam": 3},
            "preprocessor_config.json": {"size": "big"},
            "generation_config.json": {"max_new_tokens": {}},
            "cores_processor.json": {"template": 3},
        }.items():
            whole = (folder / name).read_bytes()
            (folder / name).write_text(json.dumps(json.loads(whole) | fields))
            code, line = said(ask, root, folder)
            assert code == 2 and name in line and line.count("\n") == 1, (name, line)
            (folder / name).write_bytes(whole)
    finally:
        logging.disable(logging.NOTSET)


@case(
    given="a cut model.safetensors, and an index whose shard lies outside of the folder",
    outcome="refused",
    now="one line names the file",
)
def cut_weights(root: Path) -> None:
    folder = finished(root / "model", merged=True)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        code, line = said(ask, root, folder)
        assert code == 2 and "model.safetensors: not a file of weights" in line, line
    file.rename(root / "away.safetensors")
    index = {"weight_map": {"lm_head.weight": "../away.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, line = said(ask, root, folder)
    assert code == 2 and "not a plain file name" in line, line


@case(
    given="a tokenizer_config.json whose model_max_length is a text, a list or negative",
    outcome="refused",
    now="names the folder, the file and the field",
)
def tokenizer_without_a_limit(root: Path) -> None:
    folder = finished(root / "odd", merged=True)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    for limit in ("512", [512], -1):
        file.write_text(json.dumps(content | {"model_max_length": limit}))
        code, line = said(ask, root, folder)
        assert code == 2 and "model_max_length" in line and line.count("\n") == 1, line
