"""A model on its way to the hub and back, with its card: huggingface_hub's own client against a hub
on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from cores import merge_lora_weights_and_save_hf_model as merge
from cores.model import CoresForReasoningSegmentation, CoresProcessor, ReasoningSegmenter
from cores.model.card import model_card
from cores.model.checkpoints.source import open_source
from cores.model.export import save_published
from cores.model.pushed import card_for
from cores.model.reasoning.lora import add_lora
from cores.utils import push
from tests.backbone_toys import toys, trained_run
from tests.fake_hub import TOKEN, FakeHub
from tests.fork_server import ROOT
from tests.helpers import tiny_model
from tests.scripted import scripted_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with FakeHub() as hub:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    assert merge.main(["--run", str(trained_run()), "--save_path", str(folder)]) == 0
    return folder


@pytest.fixture
def copied(tmp_path):
    """A model that answers, in a folder of its own."""
    return Path(shutil.copytree(scripted_model(), tmp_path / "model"))


# ---------------------------------------------------------------------------------------- the card


def test_the_card_of_a_merged_run_says_what_is_known(merged):
    card = ModelCard.load(merged / "README.md")
    data, text = card.data, card.text
    metrics = json.loads((trained_run() / "metrics.json").read_text())
    assert (data.pipeline_tag, data.library_name) == ("image-segmentation", "cores")
    assert data.license == "other" and "cores" in data.tags and data.datasets == ["Toy"]
    assert data.base_model is None, "folders of this machine are no names of the hub"
    found = {
        (r.metric_type, r.metric_name.split(", ")[1]): r.metric_value for r in data.eval_results
    }
    for mode, words in (("free", "free generation"), ("teacher_forced", "teacher-forced")):
        for name in ("giou", "ciou"):
            assert found[name, words] == pytest.approx(100 * metrics[mode][name], abs=0.005)
        low, high = (f"{100 * x:.1f}" for x in metrics[mode]["giou_ci95"])
        row = next(line for line in text.splitlines() if line.startswith(f"| {words}"))
        assert f"[{low}, {high}]" in row
    assert {(r.dataset_type, r.dataset_split) for r in data.eval_results} == {("Toy", "val")}
    assert "| `lora_alpha` | 16 |" in text and "An optimizer step has 2 images." in text
    assert "Apache License 2.0" in text and "their licences and terms apply" in text
    assert str(toys()) not in text, "where things lie on this machine is nobody's business"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--which", "last"], "these weights are others"),
        (None, "metrics.json is that of another training"),
        (b"{", "no metrics.json that can be read"),
    ],
)
def test_scores_of_other_weights_are_not_claimed(changes, words, tmp_path):
    run = Path(shutil.copytree(trained_run(), tmp_path / "run"))
    argv = ["--run", str(run), "--save_path", str(tmp_path / "model")]
    file = run / "metrics.json"
    if changes is None:
        metrics = json.loads(file.read_text())
        file.write_text(json.dumps(metrics | {"config": metrics["config"] | {"lr": 9.0}}))
    elif isinstance(changes, bytes):
        file.write_bytes(changes)
    else:
        argv += changes
    assert merge.main(argv) == 0
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert words in card.text and card.data.eval_results is None and "Training" in card.text


def test_names_of_the_hub_become_links_and_ids():
    model, _ = tiny_model()
    backbones = {"language model": "liuhaotian/llava-v1.5-7b", "CLIP": ""}
    backbones |= {"SAM": "/data/sam_vit_h_4b8939.pth"}
    settings = {"dataset": "sem_seg||refer_seg||own", "sample_rates": "9,3,1"}
    settings |= {"sem_seg_data": "ade20k", "refer_seg_data": "refcoco||refcoco+"}
    settings |= {"own_data": "patients"}
    text = model_card(model.config, backbones, settings)
    data = ModelCard(text).data
    assert data.base_model == ["liuhaotian/llava-v1.5-7b"]
    assert data.datasets == ["ade20k", "refcoco"], "what is no id of the hub is in the text alone"
    assert "(https://huggingface.co/liuhaotian/llava-v1.5-7b)" in text and "refcoco+" in text
    assert "the published [`sam_vit_h_4b8939.pth`]" in text and "CLIP |  |" not in text
    assert "Not known: no evaluation of these weights" in text
    tiny = model_card(model.config, {"SAM": "/somewhere/assets/tiny/sam"})
    assert "`assets/tiny/sam`, which comes with the code" in tiny and "somewhere" not in tiny
    bare = model_card(model.config)
    assert bare.count("Not known:") == 3, "base models, training, evaluation"


def test_the_example_of_the_card_runs_in_its_folder(copied, monkeypatch):
    model = CoresForReasoningSegmentation.from_pretrained(copied)
    (copied / "README.md").write_text(model_card(model.config))
    monkeypatch.chdir(copied)
    cv2.imwrite("picture.jpg", np.full((24, 32, 3), 90, np.uint8))
    (code,) = re.findall(r"```python\n(.*?)```", (copied / "README.md").read_text(), re.DOTALL)
    exec(code, {})  # noqa: S102 (what the card says)
    assert list((copied / "answer").glob("*.png"))


def test_a_card_that_was_edited_goes_with_the_model(merged, tmp_path):
    source = Path(shutil.copytree(merged, tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    argv = ["--merged", str(source), "--save_path", str(tmp_path / "half"), "--precision", "bf16"]
    assert merge.main(argv) == 0
    assert (tmp_path / "half" / "README.md").read_text().endswith("Mine.\n")


def test_the_card_of_another_author_is_not_taken_for_ours(tmp_path):
    """A published LISA says what it is in its own README.md; ours names it as the base."""
    model, processor = tiny_model(levels=("SEG",))
    save_published(model, processor, tmp_path / "lisa")
    (tmp_path / "lisa" / "README.md").write_text("# LISA\n\nTrained by others.\n")
    argv = ["--merged", str(tmp_path / "lisa"), "--save_path", str(tmp_path / "ours")]
    assert merge.main(argv) == 0
    text = (tmp_path / "ours" / "README.md").read_text()
    assert "Trained by others" not in text and "| the whole model | `lisa`, a local copy" in text
    argv = ["--merged", str(tmp_path / "ours"), "--layout", "lisa"]
    assert merge.main([*argv, "--save_path", str(tmp_path / "back")]) == 0
    opened = open_source(tmp_path / "back")
    assert card_for(model.config, opened) == text, "ours, in the layout of LISA, too"


# ---------------------------------------------------------------------------------- there and back


def test_a_pushed_folder_is_the_model_that_comes_back(hub, copied, capsys, monkeypatch):
    for name in ("notes.md", "notes.txt", "metrics.json", ".env", "optimizer.bin"):
        (copied / name).write_text("mine")
    (copied / "eval").mkdir()
    (copied / "eval" / "metrics.json").write_text("{}")
    assert push.main(["--model", str(copied), "--repo", "me/toy", "--private"]) == 0
    said = capsys.readouterr()
    assert f"me/toy: {hub.address}/me/toy/commit/" in said.out and "has no README.md" in said.out
    assert TOKEN not in said.out + said.err
    names = {file.name for file in scripted_model().iterdir()}
    assert hub.files("me/toy").keys() == names | {"README.md"}, "nothing else of the folder"
    assert hub.private == {"me/toy"} and not (copied / "README.md").exists()
    card = ModelCard(hub.files("me/toy")["README.md"].decode())
    assert 'from_pretrained("me/toy")' in card.text and card.data.library_name == "cores"

    first = hub.sha("me/toy")
    picture = np.full((24, 32, 3), 90, np.uint8)
    expected = ReasoningSegmenter.from_pretrained(copied)(picture, "where is it?")
    found = ReasoningSegmenter.from_pretrained("me/toy")(picture, "where is it?")
    assert found.text == expected.text and len(found.masks) == len(expected.masks) == 1
    assert np.array_equal(found.masks[0].mask, expected.masks[0].mask)

    # another commit, and the first one by its name
    fields = json.loads((copied / "cores_processor.json").read_text())
    (copied / "cores_processor.json").write_text(json.dumps(fields | {"system": "Be brief."}))
    assert push.main(["--model", str(copied), "--repo", "me/toy"]) == 0
    newer = ReasoningSegmenter.from_pretrained("me/toy", revision="main")
    older = ReasoningSegmenter.from_pretrained("me/toy", revision=first)
    assert newer.processor.system == "Be brief." and older.processor.system is None
    with pytest.raises(FileNotFoundError, match="me/toy"):
        ReasoningSegmenter.from_pretrained("me/toy", revision="nowhere")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="me/toy"):
        ReasoningSegmenter.from_pretrained("me/toy", cache_dir=copied / "other")


def test_a_model_is_pushed_with_its_processor_and_its_card(hub, merged):
    model = CoresForReasoningSegmentation.from_pretrained(merged)
    address = model.push_to_hub("me/whole", private=True, commit_message="First")
    assert address.startswith(f"{hub.address}/me/whole/commit/") and hub.messages == ["First"]
    files = hub.files("me/whole")
    assert {"config.json", "cores_processor.json", "README.md", "tokenizer.json"} <= files.keys()
    own = (merged / "README.md").read_text()
    assert files["README.md"].decode() == own.replace('(".")', '("me/whole")') != own

    processor = CoresProcessor.from_pretrained(merged)
    processor.system = "Be brief."
    processor.push_to_hub("me/whole")
    assert hub.files("me/whole")["README.md"] == files["README.md"], "the card stays"
    assert CoresProcessor.from_pretrained("me/whole").system == "Be brief."
    assert len(hub.repos["me/whole"]) == 2


def test_a_new_model_needs_its_processor(hub):
    model, processor = tiny_model()
    with pytest.raises(ValueError, match="give the model's processor"):
        model.push_to_hub("me/new")
    model.push_to_hub("new", processor=processor)
    card = ModelCard(hub.files("me/new")["README.md"].decode())
    assert 'from_pretrained("me/new")' in card.text, "the owner is whoever is logged in"
    with pytest.raises(ValueError, match="call push_to_hub"):
        model.save_pretrained("nowhere", push_to_hub=True)
    add_lora(model)
    with pytest.raises(ValueError, match="merge them"):
        model.push_to_hub("me/adapters", processor=processor)
    assert "me/adapters" not in hub.repos


# ---------------------------------------------------------------------------------------- mistakes


def refused(capsys, *argv: object) -> str:
    assert push.main([str(part) for part in argv]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said and TOKEN not in said
    return lines[0]


def test_without_a_login_nothing_is_asked(hub, copied, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(copied / "none"))
    assert "nobody is logged in" in refused(capsys, "--model", copied, "--repo", "me/toy")
    assert hub.asked == []


def test_what_the_hub_refuses_is_one_line(hub, copied, capsys, monkeypatch):
    assert "no rights under" in refused(capsys, "--model", copied, "--repo", "you/toy")
    assert "no name of a repository" in refused(capsys, "--model", copied, "--repo", "a/b/c")
    (copied / "README.md").write_text("---\ndatasets: [a b]\nlicense: mit\n---\n")
    assert "not valid: ['a b']" in refused(capsys, "--model", copied, "--repo", "me/toy")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf auth login" in refused(capsys, "--model", copied, "--repo", "me/toy")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(capsys, "--model", copied, "--repo", "me/toy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, "--model", copied, "--repo", "me/toy")


def test_what_is_no_whole_model_is_not_sent(hub, copied, capsys, tmp_path):
    run = trained_run()
    assert "merge it first" in refused(capsys, "--model", run, "--repo", "me/toy")
    assert "backbone" in refused(capsys, "--model", toys() / "llava", "--repo", "me/toy")
    assert "no such folder" in refused(capsys, "--model", tmp_path / "x", "--repo", "me/toy")
    (copied / "model.safetensors").unlink()
    assert "no weights here" in refused(capsys, "--model", copied, "--repo", "me/toy")
    assert hub.asked == []


def test_the_command_in_a_process_of_its_own(copied):
    """With huggingface_hub set up by its own variables."""
    with FakeHub() as hub:
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        argv = [sys.executable, "-m", "cores", "push", "--model", str(copied), "--repo", "me/toy"]
        found = subprocess.run(
            argv, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        assert "model.safetensors" in hub.files("me/toy") and hub.private == set()


# -------------------------------------------------------------------------------- ways to open one


def test_the_auto_classes_after_one_import(tmp_path):
    """In a new process, as here all is imported already."""
    code = (
        "import sys, time; started = time.perf_counter(); import cores\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "import cores.auto\n"
        "from transformers import AutoConfig, AutoModel, AutoProcessor\n"
        f"folder = {str(scripted_model())!r}\n"
        "for kind in (AutoConfig, AutoModel, AutoProcessor):\n"
        "    print(type(kind.from_pretrained(folder)).__name__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = ["CoresConfig", "CoresForReasoningSegmentation", "CoresProcessor"]
    assert found.stdout.split() == names


def test_a_run_folder_stands_for_its_merged_model(merged, tmp_path):
    run = Path(shutil.copytree(trained_run(), tmp_path / "run"))
    with pytest.raises(ValueError, match="a merged model is needed, this is the folder of a run"):
        ReasoningSegmenter.from_pretrained(run)
    shutil.copytree(merged, run / "model")
    segmenter = ReasoningSegmenter.from_pretrained(run)
    assert segmenter.model.config.model_type == "cores"


@pytest.mark.parametrize("address", ["https://example.com/dog.jpg", Path("https://example.com/a")])
def test_an_address_is_no_picture(address):
    with pytest.raises(ValueError, match="is an address, and nothing is fetched"):
        ReasoningSegmenter.from_pretrained(scripted_model())(address, "where is it?")
