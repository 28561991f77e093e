"""Published layouts: LLaVA's, LISA's and CoReS's own checkpoints, in and out; parity with recorded
runs of their code."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from cores.model import CoresForReasoningSegmentation, CoresProcessor
from cores.model.build import build_from_backbones
from cores.model.checkpoints import published
from cores.model.checkpoints.llava import load_llava
from cores.model.checkpoints.sam import PRESETS
from cores.model.checkpoints.weights import read_all
from cores.model.config import CoresConfig
from cores.model.export import save_published
from tests import published_shapes as facts
from tests.dataset_toys import SHARED
from tests.helpers import LEVELS, backbones, conversation, randomise, sample, tiny_model
from tests.parity import __main__ as parity

REFERENCE = SHARED / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"the golden numbers are not at {REFERENCE}"
)


def publish_llava(
    folder: Path, linear: bool, shards: bool = False, torch_files: bool = False
) -> Path:
    """The toy LLaVA as its authors would publish it: CLIP beside it, old constants left in."""
    source = load_llava(backbones()[0])
    llava = source.model
    weights = {}
    for name, tensor in llava.state_dict().items():
        if "vision_tower" in name:
            continue
        if linear and ".linear_2." in name:
            continue
        weights[published.their_name(published.LLAVA + name, linear)] = tensor.contiguous()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    folder.mkdir(parents=True)
    if torch_files or shards:
        names = sorted(weights)
        parts = {"a": names[::2], "b": names[1::2]} if shards else {"": names}
        index = {}
        for part, members in parts.items():
            file = f"pytorch_model{part}.bin" if torch_files else f"model{part}.safetensors"
            content = {name: weights[name] for name in members}
            (
                torch.save(content, folder / file)
                if torch_files
                else save_file(content, folder / file, metadata={"format": "pt"})
            )
            index |= dict.fromkeys(members, file)
        if shards:
            name = "pytorch_model.bin.index.json" if torch_files else "model.safetensors.index.json"
            (folder / name).write_text(json.dumps({"weight_map": index}))
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = CoresConfig(llava=llava.config, level_token_ids=[0, 1])
    content = published.their_config(config, "LlavaLlamaForCausalLM", "clip", image_marks=False)
    content["mm_projector_type"] = "linear" if linear else "mlp2x_gelu"
    (folder / "config.json").write_text(json.dumps(content))
    llava.model.vision_tower.save_pretrained(folder / "clip")
    source.image_processor.save_pretrained(folder / "clip")
    source.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("shards", "torch_files"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_llava_of_its_authors_equals_the_converted_one(tmp_path, shards, torch_files):
    ours = load_llava(backbones()[0]).model.state_dict()
    theirs = load_llava(
        str(publish_llava(tmp_path / "llava", False, shards, torch_files))
    ).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_linear_projector_is_one_layer(tmp_path):
    folder = publish_llava(tmp_path / "llava", linear=True)
    model, processor = build_from_backbones(str(folder), backbones()[1], LEVELS, template="tiny")
    assert "reasoning.llava.model.multi_modal_projector.linear_2.weight" not in model.state_dict()
    assert processor.strip_at_tokens and processor.image_marks is None
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    again = CoresForReasoningSegmentation.from_pretrained(tmp_path / "ours")
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
    assert CoresProcessor.from_pretrained(tmp_path / "ours").conversation == processor.conversation


def damage(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def states(folder: Path) -> torch.Tensor:
    """Hidden states of a LLaVA that sees a picture, by its own forward pass."""
    llava = load_llava(str(folder)).model.eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, *[llava.config.image_token_id] * 4, 8, 9, 10, 11, 12, 13]])
    pixels = torch.rand(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        return llava.model(input_ids=ids, pixel_values=pixels).last_hidden_state


@pytest.mark.parametrize(
    ("field", "value"), [("rope_theta", 100.0), ("mm_vision_select_layer", -1)]
)
def test_what_a_published_config_says_reaches_the_computation(tmp_path, field, value):
    """Every published checkpoint and every golden case has the default, which would hide that the
    field is not read."""
    folder = publish_llava(tmp_path / "llava", linear=False)
    default = states(folder)
    change_config(folder, **{field: value})
    llava, found = load_llava(str(folder)).model, states(folder)
    said = {
        "rope_theta": llava.config.text_config.rope_parameters["rope_theta"],
        "mm_vision_select_layer": llava.config.vision_feature_layer,
    }
    assert said[field] == value
    # Without the field both are the same computation on the same weights: 0 up to rounding, 1e-7.
    assert (found - default).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.norm.weight"), r"missing: model\.language_model\.norm\.weight"),
        (lambda w: w.update({"model.extra": torch.zeros(1)}), r"unexpected: .*extra"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"wrong shape: .*norm\.weight"),
        (
            lambda w: w.pop("model.embed_tokens.weight"),
            r"has no weight 'model\.embed_tokens\.weight'",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    folder = publish_llava(tmp_path / "llava", linear=False)
    damage(folder, change)
    with pytest.raises(ValueError, match=words):
        load_llava(str(folder))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mm_projector_type", "mlp9x", "mm_projector_type is 'mlp9x'"),
        ("mm_vision_select_feature", "cls", "mm_vision_select_feature is 'cls'"),
        ("mm_vision_tower", None, "names no mm_vision_tower"),
        ("mm_vision_tower", "./no/such/clip", "--vision-tower"),
        ("model_type", "llama", "needs a model of type 'llava'"),
    ],
)
def test_configs_that_cannot_be_honoured_are_named(tmp_path, field, value, words):
    folder = publish_llava(tmp_path / "llava", linear=False)
    change_config(folder, **{field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_llava(str(folder))


def test_a_missing_shard_is_named(tmp_path):
    folder = publish_llava(tmp_path / "llava", linear=False, shards=True)
    (folder / "modelb.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the shard modelb\.safetensors"):
        load_llava(str(folder))


@pytest.mark.parametrize("name", ["../away.safetensors", "/etc/passwd"])
def test_a_shard_cannot_leave_its_folder(tmp_path, name):
    folder = publish_llava(tmp_path / "llava", linear=False, shards=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="not a plain file name"):
        load_llava(str(folder))


# ------------------------------------------------------------------------------------- whole models


def answers(model, processor):
    from cores.dataset.collate import collate

    batch = collate(
        [sample(conversation(levels=processor.levels))],
        processor,
        processor.levels,
        processor.conversation,
    )
    return model.segment(batch)[0].masks, model(batch).low_res[0]


@pytest.mark.parametrize(
    ("levels", "refiner"), [(("SEG",), "none"), (LEVELS, "none"), (LEVELS, "attention+norm")]
)
def test_lisas_layout_there_and_back_keeps_every_bit(tmp_path, levels, refiner):
    released = {"kind": refiner, "pooling": "released"} if refiner != "none" else {"kind": "none"}
    model, processor = tiny_model(levels, refiner=released)
    randomise(model.text_projection)
    save_published(model, processor, tmp_path / "a")
    again, processor_again = (
        CoresForReasoningSegmentation.from_pretrained(tmp_path / "a"),
        CoresProcessor.from_pretrained(tmp_path / "a"),
    )
    ours, back = model.state_dict(), again.state_dict()
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    assert again.config.level_token_ids == model.config.level_token_ids
    assert processor_again.conversation == processor.conversation
    # The kernels' order of summing depends on where a tensor begins in memory, and these are mapped
    # from a file: measured 4.5e-8 on logits of up to 1.
    torch.testing.assert_close(
        answers(again.eval(), processor_again)[1], answers(model, processor)[1], rtol=0, atol=1e-6
    )
    save_published(again, processor_again, tmp_path / "b")
    first, second = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == json.loads(
        (tmp_path / "b" / "config.json").read_text()
    )


def test_a_lisa_without_our_files_loads_from_what_its_authors_publish(tmp_path):
    model, processor = tiny_model(("SEG",), refiner={"kind": "none"})
    save_published(model, processor, tmp_path)
    (tmp_path / "cores_processor.json").unlink()
    found = CoresProcessor.from_pretrained(tmp_path, template="llava_v1")
    assert (found.levels, found.image_token_count, found.image_size) == (["SEG"], 4, 64)
    assert found.strip_at_tokens and found.conversation.system.startswith(
        "A chat between a curious human"
    )
    assert (
        CoresForReasoningSegmentation.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32
    )


def test_what_lisas_layout_cannot_hold_is_refused(tmp_path):
    model, processor = tiny_model()
    with pytest.raises(ValueError, match=r'"attention\+norm" only'):
        save_published(model, processor, tmp_path)
    model, processor = tiny_model(("SEG",), text_projection_norm=8.0)
    with pytest.raises(ValueError, match="text_projection_norm"):
        save_published(model, processor, tmp_path)
    model, processor = tiny_model(("SEG",))
    save_published(model, processor, tmp_path)
    with pytest.raises(ValueError, match="whole LISA or CoReS"):
        load_llava(str(tmp_path))


# -------------------------------------------------------------------------- real shapes, no weights


@pytest.mark.parametrize(
    ("size", "rows", "pixels", "mlp"),
    [("7b", 32003, 224, False), ("13b", 32003, 336, True), ("7b", 32000, 336, True)],
)
def test_real_sizes_have_the_published_names_and_shapes(size, rows, pixels, mlp):
    llama = facts.LLAMA[size]
    config = {
        "hidden_size": llama["hidden"],
        "intermediate_size": llama["intermediate"],
        "num_hidden_layers": llama["layers"],
        "num_attention_heads": llama["heads"],
        "mm_projector_type": "mlp2x_gelu" if mlp else "linear",
    }
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=pixels,
        patch_size=14,
    )
    llava = published.llava_config(config, vision, rows, rows)
    full = CoresConfig(
        llava=llava, sam=vars(PRESETS["vit_h"]), levels=["SEG"], level_token_ids=[rows - 1]
    )
    with torch.device("meta"):
        model = CoresForReasoningSegmentation(full)
    found = {
        published.their_name(name, not mlp): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    assert found == facts.lisa(size, rows, pixels, mlp)


@pytest.mark.parametrize("kind", PRESETS)
def test_sam_has_the_published_names_and_shapes(kind):
    from cores.model.segmenting.sam import build_sam

    with torch.device("meta"):
        sam = build_sam(PRESETS[kind])
    assert {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()} == facts.sam(
        kind
    )


# ------------------------------------------------------------------------------------------- parity


@needs_reference
@pytest.mark.parametrize(
    "case", ["lisa_256", "cores_256", "collate_LISA", "collate_CoReS", "utils"]
)
def test_recorded_runs_of_the_published_code_agree(case, capsys):
    assert parity.main([str(REFERENCE / case)]) == 0, capsys.readouterr().out


@needs_reference
@pytest.mark.slow
def test_the_released_refiner_agrees(capsys):
    assert parity.main([str(REFERENCE / "cores2seg2mask")]) == 0, capsys.readouterr().out


@needs_reference
@pytest.mark.parametrize(
    ("case", "name"),
    [("lisa_256", "infer0.pred_masks.0"), ("collate_LISA", "llava_v1.single.labels")],
)
def test_parity_notices_one_wrong_value(tmp_path, case, name, capsys):
    shutil.copytree(REFERENCE / case, tmp_path / case)
    for path in (tmp_path / case, *(tmp_path / case).rglob("*")):
        path.chmod(0o755)
    outputs = load_file(tmp_path / case / "outputs.safetensors")
    outputs[name].view(-1)[7] += 1
    save_file(outputs, tmp_path / case / "outputs.safetensors")
    assert parity.main([str(tmp_path / case)]) == 1
    assert f"FAIL {name}" in capsys.readouterr().out


def copy_of(case: str, folder: Path) -> Path:
    shutil.copytree(REFERENCE / case, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    return folder


@needs_reference
def test_parity_reads_a_case_that_is_smaller_renamed_and_without_noise(tmp_path, capsys):
    case = copy_of("lisa_256", tmp_path / "another name ü")
    for name in ("inputs", "outputs"):
        tensors = load_file(case / f"{name}.safetensors")
        kept = {
            key: t
            for key, t in tensors.items()
            if not key.startswith(("train", "infer1", "eval_stop", "lora_train"))
        }
        save_file(kept, case / f"{name}.safetensors")
    outputs = load_file(case / "outputs.safetensors")
    save_file(outputs | {"infer0.unheard_of": torch.zeros(1)}, case / "outputs.safetensors")
    (case / "noise.json").unlink()
    assert parity.main([str(case)]) == 0
    shown = capsys.readouterr().out
    assert "left out: infer0.unheard_of" in shown and re.search(
        r"infer0 +\d+  [\d.e-]+ +[\d.e-]+ +infer0\.", shown
    )
    (case / "lora.safetensors").unlink()  # lora_infer0 is recorded, so the file has to be there
    assert parity.main([str(case)]) == 2
    assert "lora.safetensors: not found" in capsys.readouterr().err


@needs_reference
def test_parity_of_a_model_that_answers_otherwise_is_a_table_that_fails(tmp_path, capsys):
    folder = copy_of("cores_256", tmp_path / "case")
    weights = load_file(folder / "weights.safetensors")
    # another word everywhere, and no [SEG]
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(3, 0)
    save_file(weights, folder / "weights.safetensors", metadata={"format": "pt"})
    assert parity.main([str(folder)]) == 1
    assert "FAIL eval" in capsys.readouterr().out


@needs_reference
@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("outputs.safetensors", "short", "outputs.safetensors: not a file of weights"),
        ("meta.json", "{", "meta.json: not JSON"),
        ("config.json", "{}", "the case is incomplete, it lacks 'llama'"),
        ("tokenizer.model", None, "tokenizer.model"),
    ],
)
def test_parity_names_the_file_that_is_broken(tmp_path, file, content, words, capsys):
    folder = copy_of("lisa_256", tmp_path / "case")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    assert parity.main([str(folder)]) == 2
    assert words in capsys.readouterr().err


def test_parity_refuses_what_is_no_case(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 2
    assert "no case here" in capsys.readouterr().err
    assert parity.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such folder\n"


def test_clip_towers_are_named_as_this_transformers_does():
    small = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    names = CLIPVisionModel(small).state_dict()
    assert all(name.startswith(published.clip_prefix()) for name in names)


def test_a_model_that_another_transformers_saved_loads_and_is_saved_again(tmp_path):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "a")
    processor.save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    there = any(".vision_tower.vision_model." in name for name in weights)
    swap = (
        (".vision_tower.vision_model.", ".vision_tower.")
        if there
        else (".vision_tower.", ".vision_tower.vision_model.")
    )
    damage(
        tmp_path / "a",
        lambda w: [
            w.update({name.replace(*swap): w.pop(name)}) for name in list(w) if swap[0] in name
        ],
    )
    for number in range(2):  # what is loaded can be saved, and loaded again
        model_again = CoresForReasoningSegmentation.from_pretrained(tmp_path / "a")
        assert all(
            torch.equal(tensor, model_again.state_dict()[name])
            for name, tensor in model.state_dict().items()
        ), number
        model_again.save_pretrained(tmp_path / "a")
