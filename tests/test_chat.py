"""chat.py as people use it: one question, a conversation on a terminal, every kind of mistake."""

import gc
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cores import chat
from cores.dataset.files.rle import decode_rle
from tests.scripted import scripted_model

ROOT = Path(__file__).resolve().parents[1]
ANSWER = "It is [LOC] on [SEG]"


@pytest.fixture(scope="module", autouse=True)
def _model():
    """Written before a test listens to what is printed."""
    scripted_model()


@pytest.fixture
def photo(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a photo.png")
    return str(tmp_path / "a photo.png")


def flags(folder: Path, *more: str) -> list[str]:
    return [
        "--version",
        str(scripted_model()),
        "--vis_save_path",
        str(folder),
        "--max_new_tokens",
        "12",
        *more,
    ]


def type_in(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))


# ------------------------------------------------------------------------------------- one question


def test_one_question_as_json(photo, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        assert (
            chat.main(flags(out, "--image", photo, "--prompt", "where is the dog?", "--json")) == 0
        )
        report = json.loads(capsys.readouterr().out)
        assert (report["image"], report["question"], report["text"]) == (
            photo,
            "where is the dog?",
            ANSWER,
        )
        (found,) = report["masks"]
        assert list(found["files"]) == ["LOC", "SEG"]
        saved = np.array(Image.open(found["files"]["SEG"]))
        assert set(np.unique(saved)) == {0, 255}
        assert np.array_equal(saved > 0, decode_rle(found["rle"], (24, 32), "answer", "rle"))
        assert found["area"] == (saved > 0).sum()
        x0, y0, x1, y1 = found["box"]
        assert 0 <= x0 < x1 <= 32 and 0 <= y0 < y1 <= 24
        assert isinstance(found["predicted_iou"], float)
        assert Image.open(report["overlay"]).size == (32, 24)
    assert len(list(out.iterdir())) == 6, "the second answer overwrote nothing"


def test_exit_code_and_words_of_an_answer_without_mask(photo, tmp_path, capsys):
    assert chat.main(flags(tmp_path / "out", "--image", photo, "--prompt", "hello")) == 1
    assert capsys.readouterr().out.splitlines() == [
        "there",
        "  no mask: the answer does not say [LOC] [SEG]",
    ]
    assert chat.main(flags(tmp_path / "out", "--image", photo, "--prompt", "hello", "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["masks"], report["overlay"]) == ([], None)


def test_tab_completes_commands_and_paths(photo, tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    for name in ("notes.txt", "b.png"):
        (tmp_path / name).write_text("")
    commands = ["/image", "/undo", "/save", "/quit"]
    assert chat.completions("/i", commands) == ["/image "]
    assert chat.completions("/", commands)[:4] == ["/image ", "/quit ", "/save ", "/undo "]
    folder = f"{tmp_path}/"
    for typed, expected in (
        (f"{folder}m", [f"{folder}more/"]),
        (f"/image {folder}m", [f"/image {folder}more/"]),
        (f"/image {folder}n", []),  # no picture
        (f"/save {folder}n", [f"/save {folder}notes.txt"]),
        (f"/image {photo[:-2]}", [f"/image {photo}"]),
        (f"{folder}b", [f"{folder}b.png"]),
        (f"where is {photo[:-2]}", []),  # a question
        ("", [f"{name} " for name in sorted(commands)]),
    ):
        assert chat.completions(typed, commands) == expected, typed


def test_several_masks_and_a_cut_answer(photo, tmp_path, capsys):
    assert chat.main(flags(tmp_path / "out", "--image", photo, "--prompt", "the wheel")) == 0
    said = capsys.readouterr().out
    assert said.count("  [SEG] ") == said.count("  [LOC] ") == 2
    assert "cut at --max_new_tokens" in said
    assert all(Path(path).is_file() for path in re.findall(r"\] (\S+\.png)", said))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--version", "/nowhere"], "/nowhere"),
        ([], "--version"),
        (["--version", "x", "--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--version", "x", "--prompt", "where?"], "needs an --image"),
        (["--version", "x", "--image", "/nowhere.jpg", "--prompt", "where?"], "/nowhere.jpg"),
        (["--version", "x", "--image", "y", "--prompt", " "], "empty"),
        (["--version", "x", "--json"], "--json needs"),
        (["--version", "x", "--max_new_tokens", "0"], "--max_new_tokens is 0"),
        (["--version", "x", "--precision", "int3"], "int3"),
    ],
)
def test_chat_refuses_in_one_line(argv, words, capsys):
    assert chat.main(argv) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


# ------------------------------------------------------------------------------------ conversations


def test_a_conversation_survives_every_mistake(photo, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jpg").write_text("no picture")
    type_in(
        monkeypatch,
        "absent.jpg",
        "",
        str(tmp_path / "text.jpg"),
        "/undo",
        "/save",
        f"'{photo}'",
        "",
        "/nonsense",
        "where is it?",
        f"/image {tmp_path}",
        "a " * 400,
        "/image",
        "/help",
        "\x00\x1b",
        "and again?",
        "/quit",
        "never read",
    )
    assert chat.main(flags(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert said.count("error: ") == 8
    for words in (
        "there is no such picture",
        "not a readable image",
        "no answer to save",
        "unknown command /nonsense",
        "is a folder; give the path of a picture",
        "too long",
        "question is empty",
        "nothing to take back",
    ):
        assert words in said
    assert said.count(ANSWER) == 2 == said.count("  [SEG] ")
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_history_undo_reset_and_save(photo, tmp_path, monkeypatch, capsys):
    """The scripted model says "there" as long as "hello" stands anywhere in what it reads."""
    saved = tmp_path / "talk.json"
    type_in(
        monkeypatch,
        photo,
        "where?",
        "hello",
        "where?",
        f"/save {saved}",
        "/undo",
        "/undo",
        "where?",
        "hello",
        "/reset",
        "where?",
        "/save",
        photo,
        "/save",
        "/quit",
    )
    assert chat.main(flags(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    answers = [line for line in said.splitlines() if line.endswith(("there", ANSWER))]
    assert [line.endswith(ANSWER) for line in answers] == [True, False, False, True, False, True]
    assert said.count("taken back: ") == 2
    talk = json.loads(saved.read_text())
    assert [row["question"] for row in talk] == ["where?", "hello", "where?"]
    assert Path(talk[0]["masks"][0]["files"]["SEG"]).is_file()
    assert len(json.loads((tmp_path / "out" / "conversation.json").read_text())) == 1, (
        "since the reset"
    )
    assert said.count("error: there is no answer to save yet") == 1, (
        "a new picture is a new conversation"
    )


def test_an_answer_is_kept_when_its_files_cannot_be_written(photo, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("a file where the folder should be")
    type_in(monkeypatch, photo, "hello", f"/save {tmp_path / 'talk.json'}", "/quit")
    assert chat.main(flags(tmp_path / "out")) == 0
    assert "error: " in capsys.readouterr().out
    assert [row["text"] for row in json.loads((tmp_path / "talk.json").read_text())] == ["there"]


def test_saving_overwrites_no_picture(photo, tmp_path, monkeypatch, capsys):
    before = Path(photo).read_bytes()
    type_in(monkeypatch, f"/image\t{photo}", "hello", f"/save {photo}", "/save", "/save", "/quit")
    assert chat.main(flags(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert Path(photo).read_bytes() == before
    assert said.count("error: ") == said.count("give one that ends in .json") == 1
    assert said.count("1 answer saved") == 2


def test_too_little_memory_is_one_line(photo, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise chat.torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(chat.ReasoningSegmenter, "open", full)
    assert chat.main(flags(tmp_path / "out", "--image", photo, "--prompt", "hello")) == 5
    assert capsys.readouterr().err == f"error: out of memory on the GPU; {chat.LESS_MEMORY}\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"--vis_save_path": "/dev/null"},
            (
                "--vis_save_path /dev/null: masks cannot be saved there (File exists); give another"
                " folder"
            ),
        ),
        (
            {"--vis_save_path": "/proc/a/b"},
            "--vis_save_path /proc/a/b: masks cannot be saved there (No such file or directory)",
        ),
        (
            {"--image": "/nowhere.jpg"},
            "/nowhere.jpg: there is no such picture; give the path of one",
        ),
        ({"--image": "/"}, "/: is a folder; give the path of a picture"),
    ],
)
def test_what_cannot_end_well_is_said_before_the_model_is_loaded(
    photo, tmp_path, capsys, changes, words
):
    given = {
        "--version": "/no/model",
        "--image": photo,
        "--prompt": "where?",
        "--vis_save_path": tmp_path / "out",
    } | changes
    assert chat.main([str(part) for pair in given.items() for part in pair]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {words}") and said.err.count("\n") == 1 and said.out == ""


def test_old_questions_are_forgotten_with_a_word(photo, tmp_path, monkeypatch, capsys):
    type_in(monkeypatch, photo, *["where is the dog?"] * 6, "/quit")
    assert chat.main(flags(tmp_path / "out", "--model_max_length", "64")) == 0
    said = capsys.readouterr().out
    assert said.count(ANSWER) == 6
    assert "  (the oldest question was forgotten to make room)\n" in said


def test_a_conversation_ends_with_its_input(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat.main(flags(tmp_path / "out")) == 0
    assert not (tmp_path / "out").exists()


def test_nothing_that_is_typed_steers_the_terminal(photo, tmp_path, monkeypatch, capsys):
    type_in(monkeypatch, f"{photo}\x1b[31m", "/\x1b[2Jx", photo, "/quit")
    assert chat.main(flags(tmp_path / "out")) == 0
    assert "\x1b" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- terminal


class Terminal:
    """chat.py behind a pseudo-terminal."""

    def __init__(self, *argv: str):
        self.master, slave = pty.openpty()
        env = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=ROOT,
            env=env,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(slave)

    def until(self, words: str, seconds: float = 240) -> str:
        """What is printed up to ``words``."""
        seen, end = "", time.monotonic() + seconds
        while words not in seen:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], (
                f"waited for {words!r}, saw {seen!r}"
            )
            try:
                seen += os.read(self.master, 1).decode(errors="replace")
            except OSError:  # the program has ended
                raise AssertionError(f"ended before {words!r}, saw {seen!r}") from None
        return seen

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C until it is answered: a signal just before the wait for a key is noticed with the
        next key only."""
        seen, end = "", time.monotonic() + 240
        while "stopped" not in seen:
            assert time.monotonic() < end, f"Ctrl-C without effect, saw {seen!r}"
            self.type("\x03")
            while select.select([self.master], [], [], 2)[0] and "stopped" not in seen:
                seen += os.read(self.master, 1).decode(errors="replace")

    def close(self) -> int:
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()
            os.close(self.master)


SLOW = """
import sys, time
from cores import chat
from cores.model.inference import segmenter as pipeline
decode = pipeline.decode
def slow(*arguments):
    for step in decode(*arguments):
        time.sleep(0.3)
        yield step
pipeline.decode = slow
sys.exit(chat.main())
"""


def test_a_conversation_on_a_terminal(photo, tmp_path):
    """Streaming, Ctrl-C in an answer and at the prompt, the arrow key for the last line, Ctrl-D at
    the end."""
    terminal = Terminal("-c", SLOW, *flags(tmp_path / "out"))
    terminal.until("image> ")
    terminal.interrupt()
    terminal.until("image> ")
    terminal.type(f"{photo}\r")
    terminal.until("question> ")
    terminal.type("where is the dog?\r")
    terminal.until("It")
    terminal.interrupt()
    terminal.until("question> ")
    terminal.type("where?\r")
    assert "[SEG]" in terminal.until("overlay")
    terminal.until("question> ")
    terminal.type("/reset\r")
    terminal.until("question> ")
    terminal.type("\x1b[A\x1b[A\r")  # up, up: "where?"
    assert "where?" in terminal.until("overlay")
    terminal.until("question> ")
    terminal.interrupt()
    terminal.interrupt()
    terminal.until("question> ")
    terminal.type("/quit\r")
    assert terminal.close() == 0
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_ctrl_c_ends_a_single_question_quietly(photo, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cores.model.inference.segmenter.decode", interrupted)
    assert chat.main(flags(tmp_path / "out", "--image", photo, "--prompt", "where?")) == 130
    assert capsys.readouterr().err == "stopped\n"


# ---------------------------------------------------------------------------------------- endurance


def lines_of(rng: np.random.Generator, folder: Path, photo: str, turns: int):
    """Random things that people and programs type, about half of them questions."""
    (folder / "broken.png").write_bytes(Path(photo).read_bytes()[:60])
    words = [
        "where",
        "the",
        "dog",
        "wheel",
        "[SEG]",
        "<image>",
        "</s>",
        "é",
        "犬",
        "\x07",
        "\ud800",
        "a" * 50,
        "?",
    ]
    mistakes = [
        "",
        "   ",
        "hello",
        "x" * 20_000,
        "/" * 5000,
        "~nobody/x",
        f'"{photo}"',
        str(folder / "broken.png"),
        "/image",
        "/help",
        f"/image {folder}",
        "/image \x00",
        "/undo",
        "/reset",
        "/reset",
        "/save",
        "/save /dev/null/x",
        "/nonsense",
    ]
    yield photo
    for _ in range(turns):
        if rng.random() < 0.5:
            yield mistakes[rng.integers(len(mistakes))]
        else:
            yield " ".join(words[i] for i in rng.integers(0, len(words), rng.integers(1, 12)))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def endure(photo: str, tmp_path: Path, monkeypatch, turns: int, warm_up: int) -> tuple[int, int]:
    """Memory after ``warm_up`` lines and at the end."""
    lines, typed, memory = lines_of(np.random.default_rng(0), tmp_path, photo, turns), 0, {}

    def read(_prompt: str) -> str:
        nonlocal typed
        typed += 1
        if typed in (warm_up, turns):
            gc.collect()
            memory[typed] = resident()
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert chat.main(flags(tmp_path / "out")) == 0
    assert typed == turns + 2
    return memory[warm_up], memory[turns]


def test_forty_random_lines(photo, tmp_path, monkeypatch, capsys):
    endure(photo, tmp_path, monkeypatch, 40, 10)
    said = capsys.readouterr().out
    assert said.count("error: ") >= 5
    assert said.count("[SEG] ") >= 5


@pytest.mark.slow
def test_a_thousand_random_lines_in_flat_memory(photo, tmp_path, monkeypatch, capsys):
    """Measured: see docs/chat.md."""
    before, after = endure(photo, tmp_path, monkeypatch, 1000, 200)
    capsys.readouterr()
    assert after < 1.05 * before, (
        f"{before / 1e6:.0f} MB after 200 lines, {after / 1e6:.0f} MB after 1000"
    )
