"""Boxes to masks through SAM, and the local captioner: the two models that generation may use."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from cores.dataset.conversation.encoding import encode_prompt
from cores.dataset.files.images import read_image
from cores.dataset.files.rle import decode_rle
from cores.dataset.files.text import read_json
from cores.dataset.generate.scenes import AnnotationSource, read_photographs
from cores.model.checkpoints.llava import load_llava
from cores.model.checkpoints.sam import load_sam
from cores.utils.precompute import captioner
from cores.utils.precompute.boxes_to_masks import main
from tests.dataset_toys import write_json
from tests.generate_toys import SIZE, write_photos

ASSETS = Path(__file__).resolve().parents[3] / "assets/tiny"


def ego_objects(root: Path, count: int = 3) -> tuple[Path, Path]:
    """Annotations as those of EgoObjects: boxes, and names under "url"; one image is not on the
    disk."""
    annotations, images = write_photos(root, count, "ego_objects/images")
    content = read_json(annotations)
    for image in content["images"]:
        image["url"] = image.pop("file_name")
    content["images"].append({"id": 1, "url": "gone.jpg", "height": 9, "width": 9})
    content["annotations"].append(
        {"id": 999, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3]}
    )
    for entry in content["annotations"]:
        entry.pop("segmentation", None)
    return write_json(annotations, content), images


def command(annotations: Path, images: Path, out: Path) -> list[str]:
    return [
        "--annotations",
        str(annotations),
        "--images",
        str(images),
        "--vision_pretrained",
        str(ASSETS / "sam"),
        "--out",
        str(out),
    ]


def test_masks_are_those_of_the_predictor_and_scenes_can_be_read(tmp_path, capsys):
    annotations, images = ego_objects(tmp_path)
    out = tmp_path / "out/masks.json"
    assert main(command(annotations, images, out)) == 0
    before, after = read_json(annotations), read_json(out)
    assert f"{len(before['annotations']) - 1} new masks" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == ["masks.json"]
    predictor = SamPredictor(load_sam(ASSETS / "sam")[0].eval())
    names = {image["id"]: image["url"] for image in before["images"]}
    for entry in after["annotations"][:5]:
        x, y, w, h = entry["bbox"]
        predictor.set_image(read_image(images / names[entry["image_id"]]))
        expected, _, _ = predictor.predict(
            box=np.array([x, y, x + w, y + h], dtype=np.float32), multimask_output=False
        )
        found = decode_rle(entry["segmentation"], SIZE, out, "segmentation")
        # measured: 0; other batch sizes may round differently
        assert (found != expected[0]).mean() < 0.01
        assert entry["area"] == found.sum()
    assert "segmentation" not in after["annotations"][-1]
    scenes = read_photographs(AnnotationSource("ego_objects", out, images), 0)
    assert [scene.name for scene in scenes] == sorted(
        names[number] for number in names if number != 1
    )
    assert all(len(scene.objects()) >= 2 for scene in scenes)


def test_what_is_done_serves_a_corrected_file_and_the_same_sam_only(tmp_path, capsys):
    annotations, images = ego_objects(tmp_path)
    out, partial = tmp_path / "masks.json", tmp_path / "masks.json.partial.jsonl"
    content = read_json(annotations)
    last = max(content["images"][:-1], key=lambda image: image["url"])
    last["height"] += 1  # stops the run in its last image
    write_json(annotations, content)
    assert main(command(annotations, images, out)) == 2
    header, first, *others = partial.read_bytes().splitlines(keepends=True)
    assert len(others) == 1 and not out.exists()
    last["height"] -= 1
    content["annotations"][0]["bbox"][2] += 1  # one box differs, and is computed again
    write_json(annotations, content)
    # a trace that the others were not
    photo, masks = json.loads(first)
    marked = [[box, masks[0][1]] for box, _ in masks]
    partial.write_bytes(b'"other.pth"\n')
    assert main(command(annotations, images, out)) == 2
    assert "holds masks of another SAM" in capsys.readouterr().err
    partial.write_bytes(header + json.dumps([photo, marked]).encode() + b"\n" + b'["cut o')
    assert main(command(annotations, images, out)) == 0
    reused = [e for e in read_json(out)["annotations"] if e.get("segmentation") == masks[0][1]]
    assert len(reused) >= len(masks) - 1 and not partial.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            '"bbox" must be [x, y, width, height]',
        ),
        (lambda c: c.pop("images"), 'needs the lists "images" and "annotations"'),
        (lambda c: c["images"][0].update(height=7), "7×64"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, change, said):
    annotations, images = ego_objects(tmp_path)
    content = read_json(annotations)
    change(content)
    write_json(annotations, content)
    assert main(command(annotations, images, tmp_path / "out.json")) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_local_captioner_speaks_the_most_likely_words(monkeypatch):
    monkeypatch.setattr(captioner, "MAX_NEW_TOKENS", 4)
    describe = captioner.load(str(ASSETS / "llava"), template="tiny")
    image = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    words = describe(image, "what is this?")
    assert words == describe(image, "what is this?")

    backbone = load_llava(str(ASSETS / "llava"))
    llava, tokenizer = backbone.model, backbone.tokenizer
    pixels = backbone.image_processor(
        images=image, return_tensors="pt", input_data_format="channels_last"
    )["pixel_values"]
    count = llava.get_image_features(pixel_values=pixels).pooler_output[0].shape[0]
    prompt = encode_prompt("what is this?", [], [], tokenizer, "tiny", "<image>", count, [])
    ids = torch.tensor([prompt])
    for _ in range(4):
        with torch.inference_mode():
            logits = llava.eval()(
                input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)
            ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip() == words
    assert words
