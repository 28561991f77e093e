"""What is kept of visitors, for how long, and that it is the same afterwards."""

import gc
import weakref

import numpy as np
import pytest

from cores.dataset.files.errors import DataError
from cores.utils.serving.folder import TryLater
from cores.utils.serving.line import Visitor
from cores.utils.serving.visitors import REMEMBERED, VIEWS_KEPT, KeptAnswer
from tests.pages import ANSWER, VisitorlessPage


@pytest.fixture
def page(tmp_path):
    made = VisitorlessPage(tmp_path, most=4, ready=2)
    yield made
    made.close()


def test_an_answer_is_kept_without_pixels_and_comes_back_whole(page):
    path = page.sent(seed=5, size=(90, 60))
    session = page.segmenter.open(path)
    result = session.ask("where?")
    kept = KeptAnswer.of(result)
    back = kept.result(session.image)
    for mask, same in zip(result.masks, back.masks, strict=True):
        assert mask.ious == same.ious and list(mask.levels) == list(same.levels)
        assert all(np.array_equal(mask.levels[name], same.levels[name]) for name in mask.levels)
    assert (back.text, back.question, back.token_ids) == (result.text, "where?", result.token_ids)
    assert kept.shell.image.size == 0 and kept.shell.masks == []


def test_only_those_who_asked_last_are_ready_and_all_go_on(page):
    for n, key in enumerate("abc"):
        page.open(key, n)
        page.ask(key, "hello")
    conversations = [page.visitors.find(key) for key in "abc"]
    assert [c.session is not None for c in conversations] == [False, True, True]
    sessions = [weakref.ref(c.session) for c in conversations[1:]]
    assert page.ask("a", "where?") == ["there", "there"], "the model still sees its hello"
    gc.disable()
    try:
        assert conversations[1].session is None and sessions[0]() is None
    finally:
        gc.enable()
    assert conversations[1].undo() == "hello"
    assert page.ask("b", "where?") == [ANSWER], "what was taken back at rest is not seen again"


def test_the_page_that_waited_longest_and_is_closed_makes_room(page):
    for n, key in enumerate("abcd"):
        page.now = n
        page.open(key)
        page.visitors.page_opened(key)
    page.visitors.page_opened("b")
    for key in "bcd":
        page.visitors.page_closed(key)
    assert page.visitors.knows("b")
    page.now = 10
    page.visitors.find("c")
    page.open("e")
    assert sorted(page.visitors.everyone()) == ["a", "b", "c", "e"], "b has a second connection"
    assert page.visitors.why_forgotten("d") == "others needed its place"


def test_who_waits_for_the_model_is_not_sent_away(page):
    for n, key in enumerate("abcd"):
        page.now = n
        page.open(key)
    with page.line.join(Visitor("a", "")):
        page.visitors.require_place(Visitor("e", ""))
    assert page.visitors.everyone() == ["a", "c", "d"]


def test_a_new_picture_takes_the_place_of_the_last_one(page):
    for key in "abcd":
        page.open(key)
        page.visitors.page_opened(key)
    before = page.visitors.find("a").folder
    page.open("a", seed=1)
    assert not before.exists() and len(page.visitors.everyone()) == 4


def test_a_picture_that_is_refused_leaves_nothing(page):
    broken = page.folder.path / "sent" / "a.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no picture")
    page.run(page.exhausted(page.page.open(Visitor("a", ""), str(broken))))
    assert "a.png: not a readable image" in page.widgets.warnings[0]
    gone = page.run(page.exhausted(page.page.open(Visitor("a", ""), str(broken) + "x")))
    assert page.widgets.warnings[1] == "The picture is no longer here; send it again."
    assert gone[2] is None
    assert page.visitors.everyone() == [] and not list(page.folder.path.glob("conversation-*"))


def test_pages_that_are_closed_are_forgotten_soon_and_others_after_an_hour(page):
    for key in "abc":
        page.open(key)
    page.visitors.page_opened("a")
    page.visitors.page_opened("b")
    page.visitors.page_closed("b")
    page.now = 121
    page.visitors.sweep()
    assert page.visitors.everyone() == ["a", "c"]
    page.now = 3000
    page.ask("c", "hello")
    page.now = 3700
    page.visitors.sweep()
    assert page.visitors.everyone() == ["c"]


def test_a_page_that_comes_back_is_not_forgotten(page):
    page.open("a")
    page.visitors.page_opened("a")
    page.visitors.page_closed("a")
    page.visitors.page_opened("a")
    page.now = 121
    page.visitors.sweep()
    assert page.visitors.everyone() == ["a"]


def test_a_page_that_lost_its_connection_and_is_used_is_not_forgotten(page):
    page.open("a")
    page.visitors.page_opened("a")
    page.visitors.page_closed("a")
    for page.now in (100, 200, 300):
        assert page.ask("a", "hello")
        page.visitors.sweep()
    page.now = 421
    page.visitors.sweep()
    assert page.visitors.everyone() == []


def test_only_so_many_forgotten_ones_are_remembered(page):
    page.open("a")
    conversation = page.visitors.find("a")
    for n in range(REMEMBERED + 5):
        page.visitors._conversations[f"x{n}"] = conversation
        page.visitors.forget(f"x{n}", "why")
    assert page.visitors.why_forgotten("x4") is None
    assert page.visitors.why_forgotten("x5") == "why"


def test_views_and_downloads_do_not_add_up(page):
    page.open("a")
    page.ask("a", "where?")
    for opacity in range(20):
        page.run(page.page.choose(Visitor("a", ""), 0, "answer", opacity))
    folder = page.visitors.find("a").folder
    assert len(list(folder.glob("*.webp"))) == VIEWS_KEPT
    assert len(list(folder.glob("downloads-*"))) == 1


def test_a_full_disk_is_said_and_the_words_of_the_answer_stay(page):
    page.open("a")
    page.folder.most = page.folder.used() + 1
    assert page.ask("a", "where?") == [ANSWER]
    assert "no room for further files" in page.widgets.warnings[-1]


def test_a_copy_where_files_cannot_have_two_names(page, monkeypatch):
    monkeypatch.setattr("pathlib.Path.hardlink_to", lambda *_: (_ for _ in ()).throw(OSError()))
    page.open("a")
    assert page.visitors.find("a").picture.is_file()


def test_what_is_sent_again_and_again_is_the_same_picture(page):
    """gradio gives equal files one path; the end of one conversation is not that of another."""
    page.open("a")
    page.open("b")
    page.visitors.forget("a")
    page.visitors.rest_all()
    assert page.ask("b", "where?") == [ANSWER]


def test_a_file_that_is_gone_is_no_traceback(page):
    with pytest.raises(DataError, match="send it again"):
        page.visitors.receive(str(page.folder.path / "nothing.png"))
    page.open("a")
    conversation = page.visitors.find("a")
    page.visitors.rest_all()
    conversation.picture.unlink()
    with pytest.raises(Exception, match="^p.png: image does not exist"):
        page.ask("a", "where?")


def test_full_for_one_address(page):
    for n in range(2):
        page.open(f"x{n}", address="203.0.113.5")
        page.visitors.page_opened(f"x{n}")
    page.visitors.require_place(Visitor("y", "198.51.100.7"))
    page.visitors.require_place(Visitor("x1", "203.0.113.5"))
    with pytest.raises(TryLater, match="from your address are open"):
        page.visitors.require_place(Visitor("y", "203.0.113.5"))
