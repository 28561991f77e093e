"""What stands before the page."""

import asyncio
from unittest.mock import Mock

import pytest

from cores.utils.serving.folder import ServedFolder
from cores.utils.serving.guard import FILE_POLICY, MOST_BYTES
from tests.guarded import Asked, ask, guard

UPLOAD = "/gradio_api/upload"


@pytest.fixture
def folder(tmp_path):
    with ServedFolder(2**26, tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("localhost.:80", 200),
        ("[::1]:7860", 200),
        ("192.168.0.7:7860", 200),
        ("page.example.org", 200),
        ("Page.Example.org:443", 200),
        ("evil.example", 403),
        ("page.example.org.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("127.0.0.1/evil", 403),
        ("127.0.0.1:port", 403),
        ("", 403),
        (None, 400),
    ],
)
def test_hosts(folder, host, status):
    assert ask(folder, Asked("/", host=host), names=["Page.example.org"]).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:7860", 200),
        ("https://page.example.org", 200),
        ("https://page.example.org:8443", 200),
        ("https://127.0.0.1", 403),
        ("http://localhost:3000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
    ],
)
def test_origins(folder, origin, status):
    asked = Asked("/gradio_api/queue/join", "POST", origin=origin)
    assert ask(folder, asked, names=["page.example.org"]).status == status


def test_the_name_it_listens_to_is_one_of_its_names(folder):
    assert ask(folder, Asked("/", host="box.lan:7860"), host="box.lan").status == 200


def test_every_answer_forbids_frames_also_a_refusal(folder):
    for asked in (Asked("/"), Asked("/", host="evil.example"), Asked("/docs")):
        headers = ask(folder, asked).headers
        assert b"frame-ancestors 'none'" in headers[b"content-security-policy"]
        assert headers[b"x-content-type-options"] == b"nosniff"
    sent = ask(folder, Asked("/gradio_api/file=/x/a.svg")).headers
    assert sent[b"content-security-policy"] == FILE_POLICY


def test_only_uploads_may_be_large(folder):
    large = [b"x" * 2**20]
    assert ask(folder, Asked(UPLOAD, "POST", body=large)).status == 200
    refused = ask(folder, Asked("/gradio_api/queue/join", "POST", body=large))
    assert refused.status == 413
    said = Asked("/gradio_api/queue/join", "POST", length=MOST_BYTES + 1)
    assert ask(folder, said).status == 413


def test_an_upload_needs_room_and_gives_it_back(folder):
    (folder.path / "full.bin").write_bytes(b"x")
    folder.most = 2**20
    assert ask(folder, Asked(UPLOAD, "POST", length=2**20)).status == 503
    assert ask(folder, Asked(UPLOAD, "POST", length=2**19)).status == 200
    assert ask(folder, Asked(UPLOAD, "POST", length=2**19)).status == 200
    without = ask(folder, Asked(UPLOAD, "POST", body=[b"x"]))
    assert without.status == 503, "of one that says no length, the most is expected"


def test_a_page_is_there_as_long_as_its_heartbeat(folder):
    visitors, seen = Mock(), []

    async def heart(scope: dict, receive: object, send: object) -> None:
        seen.extend(visitors.mock_calls)
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        ask(folder, Asked("/gradio_api/heartbeat/key"), app=heart, visitors=visitors)
    assert [(call[0], call[1]) for call in seen] == [("page_opened", ("key",))]
    assert visitors.mock_calls[-1][:2] == ("page_closed", ("key",))


def test_the_end_of_the_server_is_passed_on(folder):
    called = []

    async def app(scope: dict, receive: object, send: object) -> None:
        called.append(scope["type"])

    asyncio.run(guard(folder, app)({"type": "lifespan"}, None, None))
    assert called == ["lifespan"]
