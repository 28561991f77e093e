"""python -m dataset.generate against a real server: faults, kills, dry runs, and results that
training reads."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cores.dataset.conversation.exemplars import LIBRARY_PATH, ExemplarLibrary
from cores.dataset.files.text import read_json
from cores.dataset.generate.__main__ import main
from cores.dataset.readers.llm_seg40k import LlmSeg40K
from cores.dataset.readers.reasoning import ReasoningSegmentation
from cores.dataset.sample import LoaderOptions
from tests.dataset.conversation import test_exemplar_library as demands
from tests.dataset_toys import LEVELS, write_json, write_reason_seg
from tests.fake_chat_server import FAULTS, FakeChatServer
from tests.generate_toys import SIZE, write_photos

ROOT = Path(__file__).resolve().parents[3]
# that one waits for a timeout; see test_chat_client.py
QUICK = tuple(fault for fault in FAULTS if fault != "slow")
KEY = "sk-very-secret-0123456789"


def flags(server: FakeChatServer) -> list[str]:
    return [
        "--base_url",
        server.url,
        "--model",
        "fake",
        "--requests_per_minute",
        "0",
        "--backoff",
        "0.01",
        "--quiet",
    ]


def questions(
    root: Path, server: FakeChatServer, *more: str, out: str = "reason_seg/LLM-Seg40K"
) -> list[str]:
    source = ["--source", "coco", str(root / "instances.json"), str(root / "coco/train2017")]
    return ["questions", *source, "--out", str(root / out), *flags(server), *more]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """What the command makes of 12 photos when nothing goes wrong but the model's answers."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_photos(root, 12)
    with FakeChatServer(flawed=True) as server:
        assert main(questions(root, server)) == 0
    return files(root / "reason_seg/LLM-Seg40K") | files(root / "reason_seg/LLM-Seg40K.generation")


def test_faults_do_not_show_in_the_result_and_training_reads_it(
    tmp_path, undisturbed, monkeypatch, capsys
):
    write_photos(tmp_path, 12)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeChatServer(faults=QUICK, flawed=True) as server:
        assert main(questions(tmp_path, server)) == 0
        assert {served.outcome for served in server.served} == {"answer", *QUICK}
        sent = len(server.served)
        assert main(questions(tmp_path, server)) == 0
        assert len(server.served) == sent, "an answer that is there is not asked for again"
        assert server.served[0].headers["Authorization"] == f"Bearer {KEY}"
    made = files(tmp_path / "reason_seg/LLM-Seg40K") | files(
        tmp_path / "reason_seg/LLM-Seg40K.generation"
    )
    journal = made.pop("journal.jsonl")
    assert made == {
        name: content for name, content in undisturbed.items() if name != "journal.jsonl"
    }
    assert len(journal.splitlines()) == sent
    written = b"".join([*made.values(), journal]).decode() + "".join(capsys.readouterr())
    assert KEY not in written and "data:image" not in written
    check_round_trip(tmp_path)


def check_round_trip(root: Path) -> None:
    """The loader of training gives every question, with the union of the boxes it was asked about
    as its mask."""
    boxes = {
        entry["id"]: entry["bbox"] for entry in read_json(root / "instances.json")["annotations"]
    }
    found = 0
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        content = read_json(root / f"reason_seg/LLM-Seg40K/{name}.json")
        loader = LlmSeg40K(root, f"LLM-Seg40K|{split}", LoaderOptions(LEVELS, training=False))
        assert len(loader) == len(content)
        for index, (photo, entry) in enumerate(sorted(content.items())):
            sample = loader.sample(index, np.random.default_rng(0))
            assert Path(sample.image_path).name == photo
            for pair, conversation in zip(entry["qa_pairs"], sample.conversations, strict=True):
                expected = np.zeros(SIZE, dtype=bool)
                for x, y, w, h in (boxes[number] for number in pair["annotation_ids"]):
                    expected[y : y + h, x : x + w] = True
                np.testing.assert_array_equal(conversation.masks[0], expected)
                assert pair["question"] in conversation.turns[0][0]
                assert pair["object"] in pair["answer"] and pair["object"] not in pair["question"]
                found += 1
    assert found > 30


def killed_while_asking(argv: list[str], server: FakeChatServer, after: int) -> None:
    """Runs the command until ``after`` more requests are answered and both of its threads wait for
    the next; kills it there."""
    server.hold_from = len(server.served) + after
    process = subprocess.Popen(
        [sys.executable, "-m", "cores.dataset.generate", *argv, "--concurrent", "2"], cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 300
        while sum(served.outcome == "held" for served in server.served[server.hold_from :]) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    server.hold_from = None


@pytest.mark.parametrize(
    "kills", [[9], pytest.param([3, 5, 0, 13], marks=pytest.mark.chaos)], ids=str
)
def test_a_run_that_was_killed_goes_on(tmp_path, undisturbed, kills):
    write_photos(tmp_path, 12)
    out = tmp_path / "reason_seg/LLM-Seg40K"
    with FakeChatServer(flawed=True) as server:
        for after in kills:
            killed_while_asking(questions(tmp_path, server), server, after)
            assert not out.exists(), "no half of a result"
        with (tmp_path / "reason_seg/LLM-Seg40K.generation/journal.jsonl").open("a") as stream:
            stream.write('{"key": "cut o')  # a kill in the middle of a line
        assert main(questions(tmp_path, server)) == 0
        answers = server.answers()
        assert len(answers) == len(set(answers)), "no request was repeated whose answer had arrived"
    made = files(out) | {
        "report.json": (tmp_path / "reason_seg/LLM-Seg40K.generation/report.json").read_bytes()
    }
    assert made == {
        name: content for name, content in undisturbed.items() if name != "journal.jsonl"
    }


def test_a_dry_run_sends_and_writes_nothing(tmp_path, capsys):
    write_photos(tmp_path, 4)
    before = sorted(tmp_path.rglob("*"))
    with FakeChatServer() as server:
        argv = questions(
            tmp_path, server, "--price_in", "2", "--price_out", "10", "--captioner_price_in", "0.5"
        )
        assert main([*argv, "--dry_run"]) == 0
        assert (server.served, sorted(tmp_path.rglob("*"))) == ([], before)
        captions, asked, total = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
        assert captions[:4] == ["caption", "0", "4", "8"] and asked[:4] == [
            "questions",
            "0",
            "4",
            "8",
        ]
        assert float(captions[6]) == pytest.approx(
            (0.5 * int(captions[4]) + 10 * int(captions[5])) / 1e6, abs=1e-4
        )
        assert float(asked[6]) == pytest.approx(
            (2 * int(asked[4]) + 10 * int(asked[5])) / 1e6, abs=1e-4
        )
        assert float(total[2]) == pytest.approx(float(captions[6]) + float(asked[6]), abs=2e-4)
        assert main(argv) == 0
        used = read_json(tmp_path / "reason_seg/LLM-Seg40K.generation/report.json")["cost"]
        assert used["questions"]["usd"] < float(asked[6])
        capsys.readouterr()
        assert main([*argv, "--dry_run"]) == 0
        assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()[1:3]] == [
            ["4", "0"]
        ] * 2


def test_items_without_an_answer_are_named_and_asked_for_again(tmp_path, capsys):
    write_photos(tmp_path, 4)
    with FakeChatServer(
        faults=("400", "answer", "answer", "answer", "answer", "answer", "answer", "answer")
    ) as server:
        assert main(questions(tmp_path, server, "--concurrent", "1")) == 1
        assert "1 of 4 items have no answer" in capsys.readouterr().err
        assert main(questions(tmp_path, server)) == 0
        assert "about 4 of 4 images" in capsys.readouterr().out


def test_a_server_that_is_not_there_ends_the_run(tmp_path, capsys):
    write_photos(tmp_path, 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with FakeChatServer() as server:
            argv = [
                *questions(tmp_path, server),
                "--base_url",
                url,
                "--retries",
                "1",
                "--give_up_after",
                "2",
            ]
        assert main(argv) == 1
    assert "2 items in a row got no answer" in capsys.readouterr().err
    assert not (tmp_path / "reason_seg/LLM-Seg40K").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--source", "coco", "x.json"], "a JSON file, a folder of images"),
        (["--source", "flickr", "x.json", "x"], "give coco or ego_objects"),
        (["--source", "coco", "x.json", "x", "many"], "does not say which images"),
        (["--concurrent", "0"], "not a whole number of at least 1"),
        (["--requests_per_minute", "-1"], "not a number of at least 0"),
        (["--extra", "[1]"], "not a JSON object"),
        (["--validation", "0.7", "--test", "0.6"], "are more than all images"),
        (["--least_share", "0.9"], "must be 0 <= least < most <= 1"),
        (["--base_url", "host"], "is not an address"),
        (["--captioner", "no.such:thing"], "give chat, none or module:function"),
        (["--captionr", "none"], "unrecognized arguments"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, more, said):
    write_photos(tmp_path, 2)
    with FakeChatServer() as server:
        assert main([*questions(tmp_path, server), *more]) == 2
        assert server.served == []
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_broken_picture_ends_the_run_in_one_line(tmp_path, capsys):
    _, images = write_photos(tmp_path, 2)
    (images / "000000000001.jpg").write_bytes(b"no picture")
    with FakeChatServer() as server:
        assert main(questions(tmp_path, server)) == 2
    error = capsys.readouterr().err
    assert "000000000001.jpg: not a readable image" in error and error.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    write_photos(tmp_path, 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cores.dataset.generate.questions.ask_about", interrupted)
    with FakeChatServer() as server:
        assert main(questions(tmp_path, server)) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_captioner_whose_model_is_missing(tmp_path, capsys):
    write_photos(tmp_path, 2)
    with FakeChatServer() as server:
        argv = questions(
            tmp_path,
            server,
            "--captioner",
            "utils.precompute.captioner:load",
            "--captioner_model",
            str(tmp_path / "none"),
        )
        assert main(argv) == 2
    assert "no such folder" in capsys.readouterr().err


def test_two_sources_must_not_share_names(tmp_path, capsys):
    write_photos(tmp_path, 2)
    with FakeChatServer() as server:
        argv = questions(
            tmp_path,
            server,
            "--source",
            "ego_objects",
            str(tmp_path / "instances.json"),
            str(tmp_path / "coco/train2017"),
        )
        assert main(argv) == 2
    assert "two sources hold an image 000000000000.jpg" in capsys.readouterr().err


def load_captioner(model: str):
    """A stand-in for utils.precompute.captioner:load."""

    def describe(image: np.ndarray, instruction: str) -> str:
        assert image.shape == (*SIZE, 3) and "photograph" in instruction
        return (
            f"The captioner {model} sees a place whose mean brightness is"
            f" {'high' if image.mean() > 99 else 'low'} today " * 2
        )

    return describe


def test_a_local_captioner(tmp_path):
    write_photos(tmp_path, 3)
    local = [
        "--captioner",
        "tests.dataset.generate.test_generate:load_captioner",
        "--captioner_model",
        "toy",
    ]
    with FakeChatServer() as server:
        assert main(questions(tmp_path, server, *local)) == 0
        prompts = [served.body["messages"][1]["content"] for served in server.served]
        assert len(prompts) == 3 and all(
            "The captioner toy sees a place" in prompt for prompt in prompts
        )
        assert main(questions(tmp_path, server, *local)) == 0
        assert len(server.served) == 3
        assert main(questions(tmp_path, server, "--captioner", "none", out="reason_seg/bare")) == 0
        assert "<summary>" not in server.served[-1].body["messages"][1]["content"]


def test_another_host_does_not_get_the_key(tmp_path, monkeypatch):
    write_photos(tmp_path, 1)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeChatServer() as server, FakeChatServer() as other:
        assert (
            main(
                questions(
                    tmp_path, server, "--captioner_url", other.url, "--captioner_model", "llava"
                )
            )
            == 0
        )
        assert (
            other.served[0].body["model"] == "llava"
            and "Authorization" not in other.served[0].headers
        )
        assert "Authorization" in server.served[0].headers


def test_exemplars_grow_and_keep_the_demands_of_the_library(tmp_path, capsys):
    out = tmp_path / "exemplars.json"
    with FakeChatServer(faults=QUICK, flawed=True) as server:
        argv = [
            "exemplars",
            "--out",
            str(out),
            "--domains",
            "farm,kitchen",
            "--per_domain",
            "5",
            *flags(server),
        ]
        assert main(argv) == 0
        sent = len(server.served)
        first = out.read_bytes()
        assert main(argv) == 0
        assert (len(server.served), out.read_bytes()) == (sent, first)
    assert "10 of them new" in capsys.readouterr().out
    known, grown = read_json(LIBRARY_PATH), read_json(out)
    assert grown[: len(known)] == known and len(grown) == len(known) + 10
    assert [entry["domain"] for entry in grown[len(known) :]] == ["farm"] * 5 + ["kitchen"] * 5
    for item in grown:
        demands.test_form(item)
    ExemplarLibrary(out)


def test_rephrased_queries_are_read_by_training(tmp_path, capsys):
    folder = write_reason_seg(tmp_path, count=2)
    texts = ["Which part of the animal on the left is used for smelling?", "the part that steers"]
    for path, text in zip(sorted(folder.glob("*.json")), texts, strict=True):
        write_json(path, read_json(path) | {"text": [text], "is_sentence": text.endswith("?")})
    before = files(folder)
    out = tmp_path / "reason_seg/ReasonSeg-rephrased/train"
    with FakeChatServer(faults=QUICK, flawed=True) as server:
        argv = [
            "rephrase",
            "--data",
            str(folder),
            "--out",
            str(out),
            "--wordings",
            "3",
            *flags(server),
        ]
        assert main(argv) == 0
        sent, first = len(server.served), files(out)
        assert main(argv) == 0
        assert (len(server.served), files(out)) == (sent, first)
        assert main([*argv, "--out", str(folder)]) == 2
    assert "--out is --data" in capsys.readouterr().err
    assert files(folder) == before
    loader = ReasoningSegmentation(
        tmp_path, "ReasonSeg-rephrased|train", LoaderOptions(LEVELS, training=False, texts="all")
    )
    for index, text in enumerate(texts):
        record = read_json(out / f"{index:03d}.json")
        assert record["text"][0] == text and len(record["text"]) == 4
        assert not any("mask" in wording for wording in record["text"])
        assert record | {"text": [text]} == json.loads(before[f"{index:03d}.json"])
        sample = loader.sample(index, np.random.default_rng(0))
        assert len(sample.conversations) == 4 and sample.conversations[0].masks.sum() == 4 * (
            index + 1
        )


def test_the_example_of_the_document_runs(tmp_path):
    """The commands of docs/generate.md, as they stand there, but for the port; the lines that it
    shows are printed."""
    document = (ROOT / "docs/generate.md").read_text(encoding="utf-8")
    script, shown = re.search(
        r"```bash\n(.*?)```.*?```text\n(.*?)```", document, re.DOTALL
    ).groups()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name in ("dataset", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = script.replace("8123", port).replace(".venv/bin/python", shlex.quote(sys.executable))
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert shown.strip() in run.stdout.replace(port, "8123"), run.stdout
