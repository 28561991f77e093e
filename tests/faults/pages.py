"""The page and its visitors."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from cores import app
from cores.chat import TerminalChat
from cores.model.inference.segmenter import Session
from cores.utils.serving.folder import ServedFolder
from cores.utils.serving.line import Visitor
from tests.faults.case import case
from tests.guarded import Asked, ask
from tests.pages import ANSWER, VisitorlessPage, Widgets, segmenter

ROOT = Path(__file__).parents[2]
STRANGER = "203.0.113.5"


@contextlib.contextmanager
def page(folder: Path, **limits: int) -> Iterator[VisitorlessPage]:
    made = VisitorlessPage(folder, **limits)
    try:
        yield made
    finally:
        made.close()


# ------------------------------------------------------------------------------- conversations


@case(
    "Seventeen visitors who take turns on one page",
    "right",
    "every question is answered; only the model's memory of a picture is bounded, and made again",
)
def the_seventeenth_visitor(tmp_path):
    with page(tmp_path, ready=4) as shared:
        keys = [f"visitor{n}" for n in range(17)]
        for n, key in enumerate(keys):
            shared.open(key, seed=n)
        alone = VisitorlessPage(tmp_path)
        alone.open("a", seed=3)
        alone.ask("a", "hello")
        right = [alone.ask("a", "where?"), alone.visitors.find("a").answers[-1].masks]
        alone.close()
        for _ in range(2):
            answers = [shared.ask(key, "hello") for key in keys]
        assert answers == [["there"] * 2] * 17
        shared.visitors.find(keys[3]).undo()
        assert [shared.ask(keys[3], "where?"), shared.visitors.find(keys[3]).answers[-1].masks] == [
            ["there", *right[0][1:]],
            right[1],
        ]
        ready = [shared.visitors.find(key).session is not None for key in keys]
        assert sum(ready) == 4


@case(
    "A stranger who calls the page again and again without a picture",
    "right",
    "a refused call leaves nothing behind, and nobody's conversation goes",
)
def a_stranger_without_a_picture(tmp_path):
    with page(tmp_path, most=2) as shared:
        shared.open("a")
        for n in range(50):
            with pytest.raises(Widgets.Error, match="First drop a picture"):
                shared.ask(f"stranger{n}", "where?", STRANGER)
        assert shared.visitors.everyone() == ["a"] and not shared.line.holds("stranger0")
        assert shared.ask("a", "where?") == [ANSWER]


@case(
    "A stranger who drops one picture after another, each as another visitor",
    "refused",
    "half of all places are for one address; whose page is open keeps the conversation",
)
def a_stranger_with_many_pictures(tmp_path):
    with page(tmp_path, most=4) as shared:
        shared.open("a")
        shared.visitors.page_opened("a")
        for n in range(2):
            shared.open(f"stranger{n}", n, STRANGER)
            shared.visitors.page_opened(f"stranger{n}")
        shared.run(shared.opened("stranger2", 2, STRANGER))
        assert "from your address are open; try again later" in shared.widgets.warnings[-1]
        assert sorted(shared.visitors.everyone()) == ["a", "stranger0", "stranger1"]
        assert shared.ask("a", "where?") == [ANSWER]


@case(
    "More visitors with open pages than the page has room for",
    "refused",
    "who comes last is told to try again later; a closed page makes room",
)
def a_full_page(tmp_path):
    with page(tmp_path, most=2) as shared:
        for key in "ab":
            shared.open(key)
            shared.visitors.page_opened(key)
        shared.run(shared.opened("c"))
        assert shared.widgets.warnings == ["2 conversations are open; try again later."]
        shared.visitors.page_closed("a")
        shared.open("c")
        with pytest.raises(Widgets.Error, match="was forgotten: others needed its place"):
            shared.ask("a", "where?")


@case(
    "A visitor who fills the queue",
    "refused",
    "one visitor has one question waiting, one address half of the queue; the rest is for others",
)
def a_visitor_who_fills_the_queue(tmp_path):
    with page(tmp_path, queue=4) as shared:
        for key in "bcde":
            shared.open(key, address=STRANGER)
        shared.open("a")

        async def fill() -> None:
            going = [shared.asking(key, STRANGER) for key in "bcd"]
            for answer in going:
                await anext(answer)
            for key, words in (("b", "stop it first"), ("e", "from your address wait already")):
                with pytest.raises(Widgets.Error, match=words):
                    await anext(shared.asking(key, STRANGER))
            going.append(shared.asking("a"))
            waits = await anext(going[-1])
            assert waits[1][-1]["content"] == "(3 others come first)"
            for answer in going:
                await answer.aclose()

        shared.run(fill())
        assert shared.ask("a", "where?") == [ANSWER]


@case(
    "A conversation that was left for an hour, then a further question",
    "refused",
    "the page says that the conversation was forgotten, and why; its files are gone",
)
def a_forgotten_conversation(tmp_path):
    with page(tmp_path) as shared:
        shared.open("a")
        shared.ask("a", "where?")
        shared.now = 3601
        shared.visitors.sweep()
        assert not list(shared.folder.path.glob("conversation-*"))
        with pytest.raises(Widgets.Error, match="was forgotten: it was not used for an hour"):
            shared.ask("a", "where?")


@case(
    "Stop, in the middle of an answer",
    "right",
    "the half turn is taken back: its question is in its box again",
)
def a_stopped_answer(tmp_path):
    with page(tmp_path) as shared:
        shared.open("a")

        async def stopped() -> tuple:
            answer = shared.asking("a", question="the wheel")
            await anext(answer)
            await answer.aclose()
            return await shared.page.stop(Visitor("a", ""), app.ANSWER, 45)

        assert shared.run(stopped())[:2] == ("the wheel", [])
        assert shared.ask("a", "hello") == ["there"]


@case(
    "Requests with null, numbers or texts where the page sends something else",
    "right",
    "one line that says what is wrong, or the first view; no internal error",
)
def values_of_other_types(tmp_path):
    with page(tmp_path) as shared:
        shared.open("a")
        for question in (None, 5, [], {}):
            with pytest.raises(Widgets.Error, match="A question is a text"):
                shared.ask("a", question)
        shared.ask("a", "where?")
        for odd in (None, "x", [], {}, float("nan"), -1):
            shown = shared.run(shared.page.choose(Visitor("a", ""), odd, odd, odd))
            assert Path(shown[0]).is_file()


# -------------------------------------------------------------------------------------- memory


@case(
    "One large picture after another in chat.py, with Python's collector switched off",
    "right",
    "a conversation that is over is freed at once, features and KV cache included",
)
def conversations_that_are_over(tmp_path):
    picture = tmp_path / "large.png"
    Image.new("RGB", (1500, 1000), (90, 160, 30)).save(picture)
    chat = TerminalChat(segmenter(), tmp_path)

    def alive() -> int:
        return sum(type(thing) is Session for thing in gc.get_objects())

    before = alive()
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            chat.open(str(picture))
            chat.ask("hello")
        assert alive() - before <= 1
    finally:
        gc.enable()


@case(
    "A PNG of 83 kB that has 81 million pixels, dropped on the page",
    "refused",
    "--max_megapixels is the limit of what is decoded; the message names it",
)
def a_small_file_with_many_pixels(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    limit = Image.MAX_IMAGE_PIXELS
    with page(tmp_path) as shared:
        app.limit_pixels(app.read_page(["--version", "x"]).max_megapixels)
        try:
            sent = shared.folder.path / "upload"
            sent.mkdir()
            (tmp_path / "bomb.png").rename(sent / "bomb.png")
            opened = shared.page.open(Visitor("a", ""), str(sent / "bomb.png"))
            shared.run(shared.exhausted(opened))
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        assert "60000000 pixels" in shared.widgets.warnings[-1]
        assert str(tmp_path) not in shared.widgets.warnings[-1]
        assert not list(shared.folder.path.glob("conversation-*"))


# ---------------------------------------------------------------------------------------- disk


@case(
    "Pictures that are sent and never opened",
    "refused",
    "they go after ten minutes, or at once for others if the page's share of the disk is full",
)
def uploads_that_nobody_opens(tmp_path):
    with ServedFolder(100 * 2**20, tmp_path) as folder:
        for n in range(6):
            sent = folder.path / f"sent{n}"
            sent.mkdir()
            with (sent / "p.png").open("wb") as file:
                file.truncate(15 * 2**20)
        upload = Asked("/gradio_api/upload", "POST", length=15 * 2**20)
        assert ask(folder, upload).status == 503
        for n in range(6):
            old = time.time() - 40
            os.utime(folder.path / f"sent{n}" / "p.png", (old, old))
        assert ask(folder, upload).status == 200
        assert folder.used() == 0


@case(
    "An upload of many files, or one that is longer than it said",
    "refused",
    "the whole request has the limit of one picture",
)
def an_upload_without_an_end(tmp_path):
    with ServedFolder(2**30, tmp_path) as folder:
        upload = Asked("/gradio_api/upload", "POST", length=30 * 2**20)
        assert ask(folder, upload).status == 413
        endless = Asked("/gradio_api/upload", "POST", body=[b"x" * 2**20] * 30)
        assert ask(folder, endless).status == 413


@case(
    "`kill`, docker stop or systemd end the page",
    "right",
    "an orderly end: what visitors sent is removed, exit code 0",
)
def a_page_that_is_terminated(tmp_path):
    def run() -> None:
        with app.ended_by_signals(), ServedFolder(2**20, tmp_path) as folder:
            (folder.path / "p.png").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 0 and list(tmp_path.iterdir()) == []


@case(
    "`kill -9` ends the page, then it is started again",
    "right",
    "the next page removes what the dead one left, and nothing of one that runs",
)
def a_page_that_was_killed(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from utils.serving.folder import ServedFolder\n"
        "folder = ServedFolder(2**20, pathlib.Path(sys.argv[1]))\n"
        "(folder.path / 'p.png').touch()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with ServedFolder(2**20, tmp_path) as running:
        (running.path / "p.png").touch()
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
        assert len(list(tmp_path.iterdir())) == 2
        with ServedFolder(2**20, tmp_path):
            assert len(list(tmp_path.rglob("p.png"))) == 1
        assert (running.path / "p.png").exists()


# -------------------------------------------------------------------------------------- guards


@case(
    "A web site whose name suddenly means this machine (DNS rebinding), or that asks in a frame",
    "refused",
    "other names than those of --allowed_hosts, other origins and frames are refused",
)
def another_web_site(tmp_path):
    with ServedFolder(2**20, tmp_path) as folder:
        for host, status in (
            ("127.0.0.1:7860", 200),
            ("localhost:7860", 200),
            ("evil.example", 403),
            ("127.0.0.1.evil.example", 403),
        ):
            assert ask(folder, Asked("/", host=host)).status == status, host
        for origin, status in (
            ("http://127.0.0.1:7860", 200),
            ("http://evil.example", 403),
            ("http://127.0.0.1:9999", 403),
            ("null", 403),
        ):
            assert ask(folder, Asked("/config", origin=origin)).status == status, origin
        headers = ask(folder, Asked("/")).headers
        assert headers[b"x-frame-options"] == b"DENY"
        assert b"frame-ancestors 'none'" in headers[b"content-security-policy"]


@case(
    "The description of gradio's API, and its other doors",
    "refused",
    "what the page itself does not ask for is not there",
)
def other_doors(tmp_path):
    with ServedFolder(2**20, tmp_path) as folder:
        for path in (
            *("/gradio_api/info", "/openapi.json", "/docs", "/gradio_api/proxy=http://x"),
            *("/gradio_api/call/ask", "/gradio_api/component_server", "/monitoring"),
        ):
            assert ask(folder, Asked(path)).status == 404, path
        assert ask(folder, Asked("/gradio_api/file=http://evil.example/a.png")).status == 403
