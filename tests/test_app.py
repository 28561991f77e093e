"""The page: what it draws, what it refuses, and the whole of it in a real browser (skipped without
gradio or Chromium)."""

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.page import PageClient, handlers, noise
from cores import app
from cores.chat import load_segmenter
from cores.dataset.files.rle import decode_rle
from cores.model.inference.results import AnswerMask, Result
from cores.utils.serving.folder import ServedFolder
from tests.pages import ANSWER, VisitorlessPage, Widgets, fail_with
from tests.scripted import scripted_model

ROOT = Path(__file__).resolve().parents[1]


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((20, 30), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def result(masks: int = 1, question: str = "where?") -> Result:
    found = AnswerMask(
        {"LOC": rectangle(2, 2, 18, 28), "SEG": rectangle(5, 5, 10, 10)}, {"LOC": 0.5, "SEG": 0.25}
    )
    return Result(
        np.full((20, 30, 3), 100, np.uint8),
        "a.png",
        question,
        "It is [LOC] [SEG]",
        [found] * masks,
        [],
        True,
    )


def photo(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(
        path
    )
    return path


# --------------------------------------------------------------------------------- without a server


def test_every_view_tints_its_own_pixels():
    side = 30  # nothing is scaled
    plain = app.paint(result(), app.PICTURE, 0.5, side)
    assert (plain == 100).all()
    target, around = (7, 7), (15, 20)
    for view, on_target, on_place in (
        (app.ANSWER, True, False),
        ("LOC", True, True),
        ("SEG", True, False),
        (app.CHAIN, True, True),
    ):
        painted = app.paint(result(), view, 0.5, side)
        assert ((painted[target] != 100).any(), (painted[around] != 100).any()) == (
            on_target,
            on_place,
        ), view
    assert not np.array_equal(
        app.paint(result(), app.ANSWER, 0.2, side)[target],
        app.paint(result(), app.ANSWER, 0.8, side)[target],
    )
    assert app.paint(result(), app.ANSWER, 0.5, 60).shape == (40, 60, 3)
    assert (app.paint(result(masks=0), app.CHAIN, 0.5, side) == 100).all()


def test_the_chain_is_shown_coarse_to_final():
    shown = re.findall(r"<figcaption>(.*?)</figcaption>", app.steps(result(), 0.5))
    assert shown == ["the picture", "1. [LOC] where to look", "2. [SEG] the answer"]
    assert app.steps(result(masks=0), 0.5) == ""


def test_the_legend_names_colours_and_escapes():
    shown = app.legend(result())
    assert "[LOC]: 69.3 % of the picture, predicted IoU 0.50" in shown
    assert "rgb(240, 50, 110)" in shown
    assert "[SEG] 2:" in app.legend(result(masks=2))
    assert "No mask: " in app.legend(result(masks=0))
    assert app.legend(None) == ""
    hostile = result()
    hostile.masks[0].levels["<b>"] = hostile.masks[0].mask
    hostile.masks[0].ious["<b>"] = 0.1
    assert "<b>" not in app.legend(hostile)


def test_masks_to_take_home(tmp_path):
    archive, coco = app.write_downloads(result(masks=2), tmp_path)
    with zipfile.ZipFile(archive) as opened:
        pictures = {
            name: np.array(Image.open(io.BytesIO(opened.read(name)))) for name in opened.namelist()
        }
    assert len(pictures) == 5
    assert np.array_equal(pictures["a_000_1_SEG.png"], 255 * rectangle(5, 5, 10, 10))
    content = json.loads(Path(coco).read_text())
    assert [row["bbox"] for row in content["annotations"]] == [[5, 5, 5, 5]] * 2
    assert (content["answer"], content["categories"][0]["name"]) == ("It is [LOC] [SEG]", "where?")


def test_examples_are_drawn_or_read(tmp_path):
    drawn = app.read_examples(None, tmp_path)
    assert len(drawn) == 3
    assert all(Path(path).is_file() and question for path, question in drawn)
    photo(tmp_path / "p.png")
    (tmp_path / "e.json").write_text(json.dumps([{"image": "p.png", "question": "where?"}]))
    assert app.read_examples(tmp_path / "e.json", tmp_path) == [[str(tmp_path / "p.png"), "where?"]]
    for content, message in (
        ({}, "must be a list"),
        ([{"image": "p.png"}], r"\[0\] needs"),
        ([{"image": "x", "question": "q"}], "x: image"),
    ):
        (tmp_path / "e.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            app.read_examples(tmp_path / "e.json", tmp_path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--version"),
        (["--version", "x", "--port", "70000"], "--port is 70000"),
        (["--version", "x", "--max_queue", "0"], "--max_queue is 0"),
        (["--version", "x", "--share"], "--share"),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys):
    assert app.main(argv) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # put back afterwards
    assert app.main(["--version", "/nowhere"]) == 2
    message = capsys.readouterr().err
    assert "run scripts/setup.sh app" in message
    assert message.count("\n") == 1


def test_its_flags_are_all_that_loading_a_model_needs():
    segmenter = app.load_segmenter(
        app.read_page(["--version", str(scripted_model()), "--max_new_tokens", "12"])
    )
    assert segmenter.decoding.max_new_tokens == 12


def test_it_listens_to_this_machine_alone_by_default():
    assert app.read_page(["--version", "x"]).host == "127.0.0.1"


def test_its_flags_load_a_model_as_those_of_chat_do():
    segmenter = load_segmenter(
        app.read_page(
            ["--version", str(scripted_model()), "--max_new_tokens", "7", "--conv_type", "tiny"]
        )
    )
    assert segmenter.decoding.max_new_tokens == 7 and segmenter.processor.template == "tiny"


def test_errors_do_not_tell_where_files_lie():
    assert (
        app._public(ValueError("/secret/place/a.jpg: broken\nimage"), "/secret/place/a.jpg")
        == "a.jpg: broken image"
    )


@pytest.fixture
def pages(tmp_path):
    """Makes pages without gradio; the arguments are those of VisitorlessPage."""
    made = []

    def make(**limits) -> VisitorlessPage:
        made.append(VisitorlessPage(tmp_path, **limits))
        return made[-1]

    yield make
    for page in made:
        page.close()


@pytest.mark.parametrize(
    ("question", "words"), [("x" * 1001, "longer than 1000 characters"), (None, "is a text")]
)
def test_a_wrong_question_is_refused_by_the_server_too(pages, question, words):
    page = pages()
    page.open("a")
    with pytest.raises(Widgets.Error, match=words):
        page.ask("a", question)


@pytest.mark.parametrize("wrong", [None, "x", [], {}, float("nan"), -1, 10**9])
def test_whatever_is_sent_for_a_view_there_is_one(pages, wrong):
    page = pages()
    page.open("a")
    page.ask("a", "where?")
    shown = page.run(page.page.view(app.Visitor("a", ""), wrong, wrong, wrong))
    assert Path(shown[0]).is_file()


def test_the_conversation_says_what_was_cut_and_what_was_forgotten(pages):
    """In the words of chat.py, below the answer that it is about, and for as long as this answer is
    shown."""
    page = pages(model_max_length=64)
    page.open("a")
    (cut,) = page.ask("a", "the wheel")
    assert cut.endswith("\n(cut at --max_new_tokens)")
    assert page.ask("a", "hello") == [cut, "there"]
    for _ in range(4):
        answers = page.ask("a", "hello")
    assert answers[:2] == [cut, "there"]
    assert "there\n(the oldest question was forgotten to make room)" in answers[2:]
    kept = page.visitors.find("a").answers[-1]
    kept.shell = replace(kept.shell, forgotten_turns=2)
    assert page.ask("a", "hello")[-2].endswith(
        "there\n(the oldest 2 questions were forgotten to make room)"
    )


def test_a_stopped_question_comes_back_into_its_box(pages):
    page = pages()
    page.open("a")
    whole = page.ask("a", "where?")

    async def half() -> None:
        visitor = app.Visitor("a", "")
        answer = page.page.ask(visitor, "the wheel", app.ANSWER, 45)
        await anext(answer)
        await answer.aclose()
        assert not page.line.holds("a")
        stopped = await page.page.stop(visitor, app.ANSWER, 45)
        assert stopped[0] == "the wheel"
        assert [message["content"] for message in stopped[1]][1::2] == whole
        assert (await page.page.stop(visitor, app.ANSWER, 45))[0] is None, "once is enough"

    page.run(half())
    assert len(page.ask("a", "hello")) == 2


def test_another_picture_ends_the_answer_about_the_one_before(pages):
    page = pages()
    page.open("a")

    async def change() -> list:
        answer = page.page.ask(app.Visitor("a", ""), "the wheel", app.ANSWER, 45)
        await anext(answer)
        opening = asyncio.ensure_future(page.opened("a", seed=1))
        await asyncio.sleep(0)
        rest = [shown async for shown in answer]
        await opening
        return rest

    assert page.run(change()) == []
    assert page.visitors.find("a").answers == []


def test_who_waits_is_told_how_many_come_first(pages):
    page = pages()
    for key in "ab":
        page.open(key)

    async def both() -> list[str]:
        first = page.page.ask(app.Visitor("a", ""), "where?", app.ANSWER, 45)
        await anext(first)
        second = page.page.ask(app.Visitor("b", ""), "hello", app.ANSWER, 45)
        waiting = await anext(second)
        rest = asyncio.ensure_future(page.exhausted(second))
        assert [message["content"] for message in (await page.exhausted(first))[1]][1] == ANSWER
        shown = await rest
        return [shown[1][-1]["content"], waiting[1][-1]["content"]]

    assert page.run(both()) == ["there", "(1 other comes first)"]


def test_a_waiting_visitor_cannot_change_what_is_being_answered(pages):
    page = pages()
    page.open("a")

    async def during() -> None:
        visitor = app.Visitor("a", "")
        answer = page.page.ask(visitor, "where?", app.ANSWER, 45)
        await anext(answer)
        for change in (page.page.reset(visitor), page.page.undo(visitor, app.ANSWER, 45)):
            with pytest.raises(Widgets.Error, match="on its way"):
                await change
        await answer.aclose()

    page.run(during())


def test_one_visitor_cannot_keep_the_painter_busy(pages):
    page = pages()
    page.open("a")

    async def many() -> list:
        looks = [page.page.view(app.Visitor("a", ""), 0, app.ANSWER, n) for n in range(20)]
        return await asyncio.gather(*looks, return_exceptions=True)

    found = page.run(many())
    assert [isinstance(shown, tuple) for shown in found] == [True] * 8 + [False] * 12
    assert "wait a moment" in str(found[-1])
    assert page.run(page.page.view(app.Visitor("a", ""), 0, app.ANSWER, 1))[0]


def test_memory_that_is_short_is_said_and_given_back(pages, monkeypatch):
    page = pages()
    page.open("a")
    conversation = page.visitors.find("a")
    with monkeypatch.context() as patch:
        patch.setattr(type(conversation.session), "stream", fail_with(MemoryError()))
        with pytest.raises(Widgets.Error, match="too little memory"):
            page.ask("a", "where?")
    assert conversation.session is None
    assert page.ask("a", "where?") == [ANSWER]


def test_an_empty_mask_is_said_in_words():
    nothing = result()
    nothing.masks[0].levels["SEG"][:] = False
    assert "[SEG]: empty, no pixel was marked" in app.legend(nothing)


def test_a_signal_ends_it_as_an_end_does():
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(SystemExit) as ended, app.ended_by_signals():
            os.kill(os.getpid(), number)
        assert ended.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------------ with a server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, gradio's Blocks, folder of its files)."""
    pytest.importorskip("gradio", reason="the page needs gradio (requirements-optional.txt)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [
        "--version",
        str(scripted_model()),
        "--port",
        str(port),
        "--max_upload_mb",
        "1",
        "--max_new_tokens",
        "12",
    ]
    limit = Image.MAX_IMAGE_PIXELS
    with ServedFolder(2**27, tmp_path_factory.mktemp("app")) as folder:
        page = app.serve(app.read_page(flags), folder, block=False)
        yield page.local_url.rstrip("/"), page, folder.path
        page.close()
    Image.MAX_IMAGE_PIXELS = limit


def get(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def upload(address: str, name: str, content: bytes) -> str:
    """The path that the server gives a file."""
    edge = uuid.uuid4().hex
    head = (
        f'--{edge}\r\nContent-Disposition: form-data; name="files";'
        f' filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    )
    body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/gradio_api/upload", body, kind), timeout=10
    ) as answer:
        return json.load(answer)[0]


def open_picture(served, path: str) -> tuple[bool, str]:
    """(success, everything that was said) of opening a picture that a visitor claims to have
    sent."""
    address, page, _ = served
    number = next(i for i, fn in page.fns.items() if fn.name == "open")
    session, picture = uuid.uuid4().hex, {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [picture], "fn_index": number, "session_hash": session}).encode()
    request = urllib.request.Request(
        f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=10).close()
    said = ""
    with urllib.request.urlopen(
        f"{address}/gradio_api/queue/data?session_hash={session}", timeout=30
    ) as stream:
        for line in stream:
            said += line.decode()
            if "process_completed" in said and line.strip() == b"":
                break
    last = next(
        json.loads(row[6:])
        for row in said.splitlines()
        if row.startswith("data:") and "process_completed" in row
    )
    return last["success"], said


def test_no_file_of_this_machine_is_served(served):
    address, *_ = served
    assert get(address + "/") == 200
    places = [
        "/etc/passwd",
        str(ROOT / "app.py"),
        "app.py",
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
    ]
    for place in places:
        assert get(f"{address}/gradio_api/file={place}") in (403, 404), place
    assert get(f"{address}/static/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd") in (403, 404)


def test_a_visitor_cannot_name_a_file_of_this_machine(served, tmp_path):
    address, _, folder = served
    sent = upload(address, "mine.png", photo(tmp_path / "mine.png").read_bytes())
    assert Path(sent).is_relative_to(folder)
    success, said = open_picture(served, sent)
    assert success
    assert "not a readable image" not in said
    assert get(f"{address}/gradio_api/file={sent}") == 200
    for place in (str(photo(tmp_path / "theirs.png")), "/etc/passwd", str(folder / ".." / "x.png")):
        success, said = open_picture(served, place)
        assert not success, place
        assert "root:" not in said


def test_every_file_of_a_visitor_goes_with_the_conversation(served, tmp_path):
    address, page, folder = served
    kept = {path.name for path in folder.iterdir() if path.name.startswith("example-")}
    sent = upload(address, "mine.png", photo(tmp_path / "mine.png").read_bytes())
    assert open_picture(served, sent)[0]
    assert list(folder.rglob("*.webp"))
    for key in list(page.visitors.everyone()):
        page.visitors.forget(key)
    page.visitors.folder.sweep(0)
    assert {path.name for path in folder.rglob("*") if path.is_file()} == kept


def test_what_is_no_picture_is_named_without_its_place(served):
    address, _, folder = served
    success, said = open_picture(served, upload(address, "broken.png", b"no picture"))
    assert success
    assert "broken.png: not a readable image" in said
    assert str(folder) not in said


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
    ],
)
def test_another_web_site_is_refused(served, headers, status):
    request = urllib.request.Request(f"{served[0]}/config", headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=10)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        assert answer.status == status
        assert answer.headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("place", ["gradio_api/info", "openapi.json", "docs", "monitoring"])
def test_the_api_is_not_described(served, place):
    assert get(f"{served[0]}/{place}") == 404


@pytest.mark.parametrize("sent", [5, [], {"path": 5}, ["a.png"]])
def test_what_no_page_sends_is_refused_in_words(served, sent, capfd):
    client = PageClient(served[0], handlers(served[0]))
    try:
        with pytest.raises(RuntimeError, match="no request of the page"):
            client.call("open", sent)
        with pytest.raises(RuntimeError, match="A question is a text"):
            client.call("ask", sent, sent, sent)
    finally:
        client.close()
    assert "Traceback" not in capfd.readouterr().err


def test_nothing_is_fetched_from_elsewhere(served, monkeypatch):
    """gradio itself fetches files by their address; not even a number of connections is tried."""
    processing = pytest.importorskip("gradio.processing_utils")
    fetched = []
    for name in ("async_ssrf_protected_download", "ssrf_protected_download"):
        monkeypatch.setattr(processing, name, lambda *args, **_: fetched.append(args))
    meta = {"meta": {"_type": "gradio.FileData"}}
    for sent in ({"url": "http://192.0.2.1/a.png"}, {"path": "http://192.0.2.1/a.png"}):
        client = PageClient(served[0], handlers(served[0]))
        try:
            with contextlib.suppress(RuntimeError):
                client.call("open", sent | meta)
        finally:
            client.close()
    assert fetched == []


def test_a_conversation_lasts_as_long_as_its_page(served):
    _, page, _ = served
    client = PageClient(served[0], handlers(served[0]))
    try:
        client.open(noise(0))
        assert client.ask("where is it?")["said"] == ["where is it?", ANSWER]
        assert page.visitors.knows(client.key)
        client.request("GET", "/config")
    finally:
        client.close()
    page.visitors.forget(client.key)
    for _ in range(50):
        if not page.visitors.knows(client.key):
            break
        time.sleep(0.1)
    gone = app.drop_gone(page, set())
    assert client.key in gone
    app.drop_gone(page, gone)
    assert client.key not in page.state_holder.session_data
    assert client.key not in page._queue.pending_messages_per_session


def test_a_large_upload_is_refused(served):
    with pytest.raises(urllib.error.HTTPError) as refused:
        upload(served[0], "big.png", b"x" * (2**20 + 1000))
    assert refused.value.code == 413


def test_a_port_in_use_is_one_line(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(served[2]))  # put back afterwards
    port = served[0].rpartition(":")[2]
    assert app.main(["--version", str(scripted_model()), "--port", port]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "choose another port" in message


# ------------------------------------------------------------------------------------------ browser


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if chromium is None:
        pytest.skip("browser tests need Chromium")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
def test_a_conversation_in_a_browser(served, browser, tmp_path):
    from playwright.sync_api import expect

    outside = []
    tab = browser.new_page(viewport={"width": 1360, "height": 1200})
    tab.on(
        "request",
        lambda r: (
            outside.append(r.url) if not r.url.startswith((served[0], "data:", "blob:")) else None
        ),
    )
    tab.goto(served[0])
    question, messages, legend = (
        tab.locator("#question textarea"),
        tab.locator("#conversation"),
        tab.locator("#legend"),
    )
    question.fill("where is the dog?")
    tab.click("#ask")
    expect(tab.get_by_text("First drop a picture")).to_be_visible(timeout=10_000)

    tab.set_input_files("#upload input[type=file]", str(photo(tmp_path / "a photo.png")))
    expect(tab.locator("#result img")).to_be_visible(timeout=10_000)
    expect(tab.locator("#masks")).to_be_disabled()
    question.fill("where is the dog?")
    tab.click("#ask")
    expect(messages).to_contain_text(ANSWER, timeout=20_000)
    expect(legend).to_contain_text("[SEG]:", timeout=10_000)
    expect(tab.locator("#chain img")).to_have_count(3, timeout=10_000)
    expect(question).to_have_value("")

    before = tab.locator("#result img").get_attribute("src")
    tab.get_by_label("whole chain").check()
    expect(tab.locator("#result img")).not_to_have_attribute("src", before, timeout=10_000)
    with tab.expect_download() as download:
        tab.click("#masks")
    with zipfile.ZipFile(download.value.path()) as opened:
        names = opened.namelist()
        final = np.array(
            Image.open(io.BytesIO(opened.read(next(n for n in names if n.endswith("SEG.png")))))
        )
    with tab.expect_download() as download:
        tab.click("#coco")
    content = json.loads(Path(download.value.path()).read_text())
    assert len(names) == 3
    assert np.array_equal(
        decode_rle(content["annotations"][0]["segmentation"], (48, 64), "coco.json", "rle"),
        final > 0,
    )

    question.fill("<b>hello</b>")  # the scripted model then answers without a mask
    question.press("Enter")
    expect(messages).to_contain_text("there", timeout=20_000)
    expect(messages).to_contain_text("<b>hello</b>")
    expect(legend).to_contain_text("no mask", timeout=10_000)
    expect(tab.locator("#masks")).to_be_disabled()
    tab.click("#undo")
    expect(question).to_have_value("<b>hello</b>", timeout=10_000)
    expect(messages).not_to_contain_text("there")
    expect(legend).to_contain_text("[SEG]:")

    question.fill("the wheel")  # which it answers at any length
    tab.click("#ask")
    expect(messages).to_contain_text("(cut at --max_new_tokens)", timeout=20_000)
    assert outside == []


@pytest.mark.slow
def test_a_stop_in_a_browser(served, browser, tmp_path):
    """The half turn is taken back, and a conversation that is gone says so."""
    from playwright.sync_api import expect

    tab = browser.new_page(viewport={"width": 1360, "height": 1200})
    tab.goto(served[0])
    tab.set_input_files("#upload input[type=file]", str(photo(tmp_path / "p.png")))
    expect(tab.locator("#result img")).to_be_visible(timeout=10_000)
    question = tab.locator("#question textarea")
    model = served[1].visitors.segmenter
    model.decoding = replace(model.decoding, max_new_tokens=400)
    try:
        question.fill("the wheel")
        tab.click("#ask")
        expect(tab.locator("#conversation")).to_contain_text("It is", timeout=20_000)
        tab.click("#stop")
        expect(question).to_have_value("the wheel", timeout=10_000)
        expect(tab.locator("#conversation")).not_to_contain_text("It is")
    finally:
        model.decoding = replace(model.decoding, max_new_tokens=12)
    for key in served[1].visitors.everyone():
        served[1].visitors.forget(key, "others needed its place")
    tab.click("#ask")
    expect(tab.get_by_text("This conversation was forgotten")).to_be_visible(timeout=10_000)


@pytest.mark.slow
def test_on_a_phone_the_answer_comes_before_the_examples(served, browser):
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto(served[0])
    tab.locator("#examples img").first.wait_for()
    places = [tab.locator(f"#{name}").bounding_box()["y"] for name in ("ask", "result", "examples")]
    assert places == sorted(places)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_an_example_in_a_browser(served, browser):
    from playwright.sync_api import expect

    tab = browser.new_page(viewport={"width": 1360, "height": 1200})
    tab.goto(served[0])
    tab.locator("#examples img").first.click()
    expect(tab.locator("#result img")).to_be_visible(timeout=15_000)
    expect(tab.locator("#question textarea")).not_to_have_value("")
    tab.click("#ask")
    expect(tab.locator("#legend")).to_contain_text("[LOC]", timeout=20_000)
