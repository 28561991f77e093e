"""The server of OpenAI's protocol, asked by OpenAI's own client through a real socket."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from pycocotools import mask as rle_codec

from cores.dataset.conversation.turns import AnswerToken
from cores.model import ReasoningSegmenter
from cores.utils.serving import api, protocol
from cores.utils.settings.programs import read_serve
from tests.scripted import scripted_model

ROOT = Path(__file__).resolve().parents[3]
KEY = "a-key-for-tests"


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def address(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def asked(question: str = "where?", seed: int = 0, url: str | None = None) -> dict:
    image = {"type": "image_url", "image_url": {"url": url or address(picture(seed))}}
    return {"role": "user", "content": [image, {"type": "text", "text": question}]}


@contextlib.contextmanager
def serving(*flags: str):
    """The server in a thread of this process; yields it and its base address."""
    args = read_serve(["--version", str(scripted_model()), "--max_new_tokens", "12", *flags])
    server = api.Server(args, api.api_key(args))
    listening = socket.create_server(("127.0.0.1", 0))
    web = api.uvicorn.Server(api.uvicorn.Config(server.app, log_level="warning"))
    thread = threading.Thread(target=web.run, args=([listening],))
    thread.start()
    try:
        server.model.load(lambda: api.load_segmenter(args), pytest.fail)
        base = f"http://127.0.0.1:{listening.getsockname()[1]}"
        until = time.monotonic() + 60
        while server.model.segmenter is None or not web.started:
            assert time.monotonic() < until
            time.sleep(0.05)
        yield server, base
    finally:
        web.should_exit = True
        thread.join(30)
        listening.close()


@pytest.fixture(scope="module")
def running():
    with serving("--api_key", KEY, "--served_name", "scripted", "--max_body_mb", "1") as found:
        yield found


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running[1]}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def complete(client: openai.OpenAI, *messages: dict, **options):
    return client.chat.completions.create(model="scripted", messages=list(messages), **options)


def pixels_of(mask: dict) -> np.ndarray:
    return rle_codec.decode(mask["rle"]).astype(bool)


def expected(seed: int, question: str = "where?"):
    return ReasoningSegmenter.from_pretrained(scripted_model(), max_new_tokens=12)(
        picture(seed), question
    )


def test_an_answer_is_that_of_python(client):
    found, ours = complete(client, asked(seed=3)), expected(3)
    message = found.choices[0].message
    assert message.content == ours.text and found.choices[0].finish_reason == "stop"
    (mask,) = message.masks
    assert mask["token"] == "[SEG]" and mask["area"] == ours.masks[0].area
    assert (pixels_of(mask) == ours.masks[0].mask).all()
    assert [step["level"] for step in mask["chain"]] == ["LOC"]
    assert (pixels_of(mask["chain"][0]) == ours.masks[0].coarse["LOC"]).all()
    assert found.usage.completion_tokens == len(ours.token_ids) + 1
    assert found.usage.prompt_tokens > len("where?")


def test_a_stream_joins_to_the_same_answer(client):
    whole = complete(client, asked(seed=4)).choices[0].message
    pieces = list(
        complete(client, asked(seed=4), stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.content
    assert pieces[-2].choices[0].delta.masks == whole.masks
    assert pieces[-2].choices[0].finish_reason == "stop"
    assert not pieces[-1].choices and pieces[-1].usage.completion_tokens > 1


def test_a_follow_up_sees_what_was_said(client):
    """The model says "there" once "hello" stands anywhere in the conversation."""
    first = complete(client, asked("hello"))
    assert first.choices[0].message.content == "there" and first.choices[0].message.masks == []
    said = {"role": "assistant", "content": "there"}
    follow = complete(client, asked("hello"), said, {"role": "user", "content": "where?"})
    alone = complete(client, asked("where?"))
    assert follow.choices[0].message.content != alone.choices[0].message.content
    # An answer with masks may come back as it was sent.
    message = alone.choices[0].message.model_dump()
    again = complete(client, asked("where?"), message, {"role": "user", "content": "and now?"})
    assert again.usage.prompt_tokens > alone.usage.prompt_tokens


def test_tokens_in_a_history_are_tokens_again():
    found = protocol.answer_from_text("It is [LOC] on [SEG].", ["LOC", "SEG"])
    assert found == ["It is ", AnswerToken("LOC"), " on ", AnswerToken("SEG"), "."]


def test_an_answer_is_cut_where_it_was_asked(client):
    found = complete(client, asked("wheel"), max_tokens=3)
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 3
    assert complete(client, asked("wheel")).usage.completion_tokens == 12
    assert complete(client, asked("wheel"), max_tokens=500).usage.completion_tokens == 12


def test_every_one_of_many_gets_the_answer_to_its_own_picture(client):
    ours = {seed: expected(seed).masks[0].mask for seed in range(6)}
    assert len({mask.tobytes() for mask in ours.values()}) > 1

    def ask(number: int) -> bool:
        stream = number % 2 == 0
        found = complete(client, asked(seed=number % 6), stream=stream)
        masks = list(found)[-1].choices[0].delta.masks if stream else found.choices[0].message.masks
        return bool((pixels_of(masks[0]) == ours[number % 6]).all())

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert all(pool.map(ask, range(24)))


HISTORY = [asked(), {"role": "assistant", "content": "x"}]
BROKEN = "data:image/png;base64," + base64.b64encode(b"no picture").decode()


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "another"}, 404, "it is 'scripted'"),
        ({"messages": []}, 422, "must be a question"),
        ({"messages": HISTORY}, 422, "must be a question"),
        ({"messages": [*HISTORY, asked()]}, 422, "about one picture"),
        ({"messages": [asked(), asked()]}, 422, "take turns"),
        ({"messages": [{"role": "user", "content": "where?"}]}, 422, "has no picture"),
        ({"messages": [{"role": "system", "content": "be brief"}, asked()]}, 422, "messages.0"),
        ({"messages": [asked(" ")]}, 422, "messages.0: the question is empty"),
        ({"messages": [asked("word " * 3000)]}, 422, "the question is too long"),
        ({"messages": [asked(url=BROKEN)]}, 400, "cannot be read as a picture"),
        ({"messages": [asked(url="data:image/png;base64,%%")]}, 400, "not valid base64"),
        ({"messages": [asked(url="data:image/png,abc")]}, 422, "needs the form"),
        ({"messages": [asked(url="http://example.com/a.png")]}, 422, "--allow_urls"),
        ({"messages": [asked(url="/etc/passwd")]}, 422, "data:image"),
        ({"temperature": 0.7}, 422, "temperature"),
        ({"n": 2}, 422, "n: "),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 422, "tools"),
        ({"max_tokens": 0}, 422, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, change, status, words):
    request = {"model": "scripted", "messages": [asked()]} | change
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**request)
    assert caught.value.status_code == status
    error = caught.value.body
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert str(scripted_model()) not in json.dumps(error)


def test_requests_that_are_none(running):
    server, base = running
    post = f"{base}/v1/chat/completions"
    key = {"Authorization": f"Bearer {KEY}"}
    for content, status in ((b"{", 400), (b"\xff\xfe", 400), (b"[]", 422), (b"{}", 422)):
        found = httpx.post(post, content=content, headers=key)
        assert found.status_code == status and found.json()["error"]["message"]
    large = json.dumps({"model": "scripted", "messages": [asked("x" * 2**21)]}).encode()
    assert httpx.post(post, content=large, headers=key).status_code == 413
    parts = (large[i : i + 65536] for i in range(0, len(large), 65536))
    assert httpx.post(post, content=parts, headers=key).status_code == 413
    assert httpx.get(post, headers=key).status_code == 405
    assert httpx.get(f"{base}/v1/nothing").json()["error"]["message"].startswith("there is no GET")
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(base + path, headers=headers).status_code == 401
        assert httpx.post(post, content=b"{}", headers=headers).status_code == 401
    assert httpx.get(f"{base}/health").json() == {"status": "ready"}
    assert httpx.get(f"{base}/v1/models", headers=key).json()["data"][0]["id"] == "scripted"
    metrics = httpx.get(f"{base}/metrics", headers=key).text
    assert 'cores_requests_total{status="413"} 2' in metrics and "cores_waiting 0" in metrics


def slow(monkeypatch, server, seconds: float) -> None:
    """Every piece of an answer takes a while."""
    real = api.Session.stream

    def stream(self, question):
        pieces = real(self, question)
        following = type(pieces).__next__

        class Slow(type(pieces)):
            def __next__(self):
                time.sleep(seconds)
                return following(self)

        pieces.__class__ = Slow
        return pieces

    monkeypatch.setattr(api.Session, "stream", stream)


def test_a_full_line_and_a_time_limit(monkeypatch):
    with serving("--max_queue", "1", "--time_limit", "1.5") as (server, base):
        slow(monkeypatch, server, 0.6)
        name = scripted_model().name
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:

            def ask(_: int) -> int:
                try:
                    client.chat.completions.create(model=name, messages=[asked("wheel")])
                    return 200
                except openai.APIStatusError as error:
                    waits = "retry-after" in error.response.headers
                    return error.status_code if waits == (error.status_code == 429) else 0

            with concurrent.futures.ThreadPoolExecutor(5) as pool:
                codes = sorted(pool.map(ask, range(5)))
        assert codes == [429, 429, 429, 504, 504]
        assert server.waiting == 0


def test_a_client_that_leaves_is_not_worked_for(monkeypatch):
    with serving() as (server, base):
        slow(monkeypatch, server, 0.3)
        name = scripted_model().name
        request = {"model": name, "messages": [asked("wheel")]}
        for stream in (False, True):
            body = json.dumps(request | {"stream": stream}).encode()
            port = int(base.rpartition(":")[2])
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            with socket.create_connection(("127.0.0.1", port)) as left:
                left.sendall(head.encode() + b"\r\n\r\n" + body)
                time.sleep(1.0)
                assert server.waiting == 1
            until = time.monotonic() + 5
            while server.waiting and time.monotonic() < until:
                time.sleep(0.05)
            assert server.waiting == 0
        monkeypatch.undo()
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none") as client:
            assert client.chat.completions.create(model=name, messages=[asked()]).choices


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "0.0.0.0", "2130706433"],
)
def test_no_address_of_this_network_is_fetched(host):
    with pytest.raises(protocol.Refused, match=r"not an address of the open web|not be fetched"):
        protocol.read_picture(f"http://{host}/a.png", "messages.0", 10**6)


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.delenv("CORES_API_KEY", raising=False)
    flags = ["--version", "x", "--host", "0.0.0.0"]
    with pytest.raises(ValueError, match="CORES_API_KEY"):
        api.api_key(read_serve(flags))
    assert api.api_key(read_serve([*flags, "--no_auth"])) is None
    assert api.api_key(read_serve(["--version", "x"])) is None
    monkeypatch.setenv("CORES_API_KEY", "k")
    assert api.api_key(read_serve(flags)) == "k"


def test_the_command_serves_until_it_is_stopped(tmp_path):
    """A port in use and a folder without a model are a line; a signal ends it in order."""
    program = [sys.executable, "-m", "cores", "serve", "--port"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    how = {"cwd": ROOT, "env": environment, "text": True}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        argv = [*program, port, "--version", str(scripted_model())]
        found = subprocess.run(argv, capture_output=True, timeout=120, **how)
        assert found.returncode == 2 and "choose another port" in found.stderr
    argv = [*program, "0", "--version", str(tmp_path)]
    found = subprocess.run(argv, capture_output=True, timeout=120, **how)
    assert found.returncode == 2 and found.stderr.startswith(f"error: {tmp_path}/")
    argv = [*program, "0", "--version", str(scripted_model())]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) as process:
        try:
            base = process.stdout.readline().strip()
            until = time.monotonic() + 120
            while httpx.get(base.removesuffix("/v1") + "/health").status_code != 200:
                assert time.monotonic() < until
                time.sleep(0.2)
            with openai.OpenAI(base_url=base, api_key="none") as client:
                name = client.models.list().data[0].id
                answer = client.chat.completions.create(model=name, messages=[asked()])
            assert answer.choices[0].message.masks
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 130
            assert process.stderr.read() == "stopped\n"
        finally:
            process.kill()
