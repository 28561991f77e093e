"""The server of OpenAI's protocol, asked by OpenAI's own client through a real socket."""

import base64
import contextlib
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec

from cores.__main__ import main as cores_main
from cores.dataset.conversation.turns import AnswerToken
from cores.dataset.files.errors import DataError
from cores.model import AnswerMask, ReasoningSegmenter, Result
from cores.utils.serving import api, protocol, sent
from cores.utils.serving.protocol import Refused
from cores.utils.settings.programs import read_serve
from tests.scripted import scripted_model

ROOT = Path(__file__).resolve().parents[3]
KEY = "a-key-for-tests"
QUESTION = "where?"
WAIT = 60  # seconds for what takes none unless something hangs


# ------------------------------------------------------------------------------------- to ask with


def picture(seed: int) -> Image.Image:
    """Another one, of another size, for every ``seed``."""
    size = 20 + seed % 7, 24 + seed % 11
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def address(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def asked(question: str = QUESTION, seed: int = 0, url: str | None = None) -> dict:
    image = {"type": "image_url", "image_url": {"url": url or address(picture(seed))}}
    return {"role": "user", "content": [image, {"type": "text", "text": question}]}


def until(condition) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Running:
    """A server in a thread of this process."""

    def __init__(self, *flags: str):
        argv = ["--version", str(scripted_model()), "--max_new_tokens", "12", *flags]
        args = read_serve([*argv, "--served_name", "scripted"])
        key = api.api_key(args)
        self.server = api.Server(args, key)
        self.web = api._Uvicorn(self.server)
        self._socket = api.listen("127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.post = f"{self.base}/v1/chat/completions"
        self.headers = {"Authorization": f"Bearer {key}"}
        self._thread = threading.Thread(target=self.web.run, args=([self._socket],))
        self._thread.start()
        self.server.model.load(lambda: api.load_segmenter(args), pytest.fail)
        until(lambda: self.server.model.segmenter is not None and self.web.started)
        self.client = openai.OpenAI(
            base_url=f"{self.base}/v1", api_key=key or "none", max_retries=0, timeout=WAIT
        )
        self.pool = ThreadPoolExecutor(64)

    def stop(self) -> None:
        self.web.should_exit = True
        self._thread.join(WAIT)
        self.server.model.close()
        self.client.close()
        self.pool.shutdown()
        self._socket.close()

    def complete(self, *messages: dict, **options):
        request = {"model": "scripted", "messages": list(messages or [asked()])} | options
        return self.client.chat.completions.create(**request)

    def later(self, *messages: dict, **options) -> Future:
        return self.pool.submit(self.complete, *messages, **options)

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.base}/metrics", headers=self.headers).text.splitlines():
            if line.startswith(f"cores_{name} "):
                return float(line.split()[-1])
        return 0.0

    def refused(self, status: int, **options) -> dict:
        """The error, which must have the status."""
        with pytest.raises(openai.APIStatusError) as caught:
            self.complete(**options)
        assert caught.value.status_code == status, caught.value.body
        assert {"message", "type", "param", "code"} == caught.value.body.keys()
        return caught.value.body | {"headers": caught.value.response.headers}


@pytest.fixture(scope="module")
def running():
    limit = Image.MAX_IMAGE_PIXELS  # set by every server
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORES_API_KEY", KEY)
        found = Running("--max_body_mb", "1", "--max_megapixels", "1")
    yield found
    found.stop()
    Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def another(*flags: str):
    found = Running(*flags)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture
def gate(monkeypatch):
    """While it is closed, the model stops at what it would say next."""
    found = threading.Event()
    tell = api.Answering.tell

    def wait_and_tell(answering, piece):
        assert found.wait(WAIT)
        tell(answering, piece)

    monkeypatch.setattr(api.Answering, "tell", wait_and_tell)
    yield found
    found.set()


def pixels_of(mask: dict) -> np.ndarray:
    return rle_codec.decode(mask["rle"]).astype(bool)


@pytest.fixture(scope="module")
def python() -> ReasoningSegmenter:
    return ReasoningSegmenter.from_pretrained(scripted_model(), max_new_tokens=12)


# ----------------------------------------------------------------------------------------- answers


def test_an_answer_is_that_of_python(running, python):
    found, ours = running.complete(asked(seed=3)), python.open(picture(3)).ask(QUESTION)
    assert found.model == "scripted" and found.choices[0].finish_reason == "stop"
    message = found.choices[0].message
    assert message.content == ours.text == "It is [LOC] on [SEG]"
    assert (message.forgotten_turns, message.why_no_mask) == (0, None)
    assert [m["token"] for m in message.masks] == ["[LOC]", "[SEG]"]
    for mask in message.masks:
        at, level = mask["position"], mask["level"]
        assert message.content[at : at + len(mask["token"])] == mask["token"] == f"[{level}]"
        right = ours.masks[0].levels[level]
        assert mask["rle"]["size"] == list(right.shape) == list(picture(3).size[::-1])
        assert (pixels_of(mask) == right).all() and mask["area"] == right.sum() > 0
        x, y, width, height = mask["bbox"]
        assert right[y : y + height, x : x + width].sum() == right.sum()
        assert right[y].any() or right[:, x].any()
        assert mask["predicted_iou"] == round(ours.masks[0].ious[level], 4)
        assert (mask["group"], mask["reason"]) == (0, None)
    assert found.usage.completion_tokens == len(ours.token_ids) + 1
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    session = python.open(picture(3))
    session.ask(QUESTION)
    assert found.usage.prompt_tokens == session.prompt_tokens


def test_a_stream_joins_to_the_same_answer(running):
    whole = running.complete(asked(seed=4))
    message = whole.choices[0].message
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, end, usage = running.complete(asked(seed=4), **with_usage)
    texts = [piece.choices[0].delta.content for piece in pieces]
    assert "".join(texts) == message.content and len(list(filter(None, texts))) > 1
    assert end.choices[0].delta.masks == message.masks
    assert end.choices[0].finish_reason == "stop"
    assert not usage.choices and usage.usage == whole.usage
    assert len({piece.id for piece in (*pieces, end, usage)}) == 1
    *_, end = running.complete(asked(seed=4), stream=True)
    assert end.choices[0].finish_reason == "stop", "no usage where none is asked for"
    request = {"model": "scripted", "messages": [asked()], "stream": True}
    found = httpx.post(running.post, json=request, headers=running.headers)
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.text.endswith("data: [DONE]\n\n")


def test_a_follow_up_sees_what_was_said(running, python):
    """The model says "there" once "hello" stands anywhere in the conversation."""
    first = running.complete(asked("hello")).choices[0].message
    assert (first.content, first.masks) == ("there", [])
    assert first.why_no_mask == "the answer does not say [LOC] [SEG]"
    further = {"role": "user", "content": QUESTION}
    follow = running.complete(asked("hello"), first.model_dump(), further)
    assert follow.choices[0].message.content == "there"
    # Answers with tokens come back as tokens: the prompt is that of a session of Python.
    said = running.complete(asked(seed=5)).choices[0].message.model_dump()
    session = python.open(picture(5))
    session.ask(QUESTION)
    ours = session.ask("and the dog?")
    follow = running.complete(asked(seed=5), said, {"role": "user", "content": "and the dog?"})
    assert follow.choices[0].message.content == ours.text
    assert (pixels_of(follow.choices[0].message.masks[-1]) == ours.masks[0].mask).all()
    assert follow.usage.prompt_tokens == session.prompt_tokens
    # An answer without words is not remembered.
    mute = running.complete(asked(seed=5), {"role": "assistant", "content": ""}, further)
    alone = running.complete(asked(seed=5))
    assert mute.usage.prompt_tokens == alone.usage.prompt_tokens


def test_oldest_turns_are_forgotten_and_it_is_said(running):
    turns = []
    for number in range(12):
        turns += [asked() if not number else {"role": "user", "content": "what is it ?"}]
        turns += [{"role": "assistant", "content": "It is [LOC] on [SEG] " + "dog " * 20}]
    found = running.complete(*turns, {"role": "user", "content": QUESTION})
    assert found.choices[0].message.forgotten_turns > 0
    assert found.usage.prompt_tokens <= 256


def test_tokens_in_a_history_are_tokens_again():
    found = protocol.answer_from_text("It is [LOC] on [SEG].", ["LOC", "SEG"])
    assert found == ["It is ", AnswerToken("LOC"), " on ", AnswerToken("SEG"), "."]


def test_every_token_has_its_mask_or_a_reason(python):
    tokenizer, levels = python.processor.tokenizer, python.processor.levels
    ids = tokenizer.convert_tokens_to_ids(
        ["It", "[SEG]", "[LOC]", "on", "[SEG]", "[LOC]", "[LOC]", "[SEG]", "there"]
    )
    empty, full = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    groups = [AnswerMask({"LOC": full, "SEG": empty}, {"LOC": 0.5, "SEG": 0.25})]
    groups += [AnswerMask({"LOC": empty, "SEG": full}, {"LOC": 0.1, "SEG": 0.2})]
    text = python.text(ids)
    result = Result(np.zeros((2, 3, 3), np.uint8), "", "", text, groups, ids, True)
    rows = protocol.masks(result, tokenizer, levels)
    assert [row["group"] for row in rows] == [None, 0, 0, None, 1, 1]
    assert [row["token"] for row in rows] == [
        text[row["position"] :][: len(row["token"])] for row in rows
    ]
    assert [row["area"] for row in rows] == [None, 6, 0, None, 0, 6]
    assert [row["bbox"] for row in rows] == [None, [0, 0, 3, 2], None, None, None, [0, 0, 3, 2]]
    lost, empty_mask = protocol.NO_GROUP, protocol.EMPTY
    assert [row["reason"] for row in rows] == [lost, None, empty_mask, lost, empty_mask, None]
    assert [row["rle"] is None for row in rows] == [True, False, False, True, False, False]


def test_an_answer_is_cut_where_it_was_asked(running):
    for name in ("max_tokens", "max_completion_tokens"):
        found = running.complete(asked("wheel"), **{name: 3})
        assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 3
    assert running.complete(asked("wheel")).usage.completion_tokens == 12
    assert running.complete(asked("wheel"), max_tokens=500).usage.completion_tokens == 12


def test_a_temperature_draws_and_a_seed_repeats(running):
    def drawn(**options) -> str:
        return running.complete(max_tokens=12, **options).choices[0].message.content

    likeliest = drawn()
    assert drawn(temperature=0) == drawn(temperature=0.0, seed=5) == likeliest
    found = [drawn(temperature=2, seed=seed) for seed in range(4)]
    assert found == [drawn(temperature=2, seed=seed) for seed in range(4)] and len(set(found)) > 1
    assert drawn(temperature=2, seed=1, top_p=1e-6) == likeliest


def test_everybody_gets_the_answer_to_their_own_picture(running, python):
    ours = [python.open(picture(seed)).ask(QUESTION) for seed in range(50)]
    assert len({answer.masks[0].mask.tobytes() for answer in ours}) > 45
    before = running.metric('requests_total{status="200"}')
    answers = [running.later(asked(seed=n), stream=n % 2 == 0) for n in range(50)]
    for answer, right in zip(answers, ours, strict=True):
        found = answer.result(WAIT)
        if isinstance(found, openai.Stream):
            *pieces, end = found
            text, masks = (
                "".join(piece.choices[0].delta.content for piece in pieces),
                end.choices[0].delta.masks,
            )
        else:
            text, masks = found.choices[0].message.content, found.choices[0].message.masks
        assert text == right.text
        for mask in masks:
            assert np.array_equal(pixels_of(mask), right.masks[0].levels[mask["level"]])
    assert running.metric('requests_total{status="200"}') == before + 50
    until(lambda: running.server.places == 0)
    assert len(running.server.model._sessions) <= running.server.args.keep_ready == 8


# ------------------------------------------------------------------------------- what is refused

BROKEN = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
CUT = address(Image.effect_noise((64, 64), 90))[: 22 + 1976]
TURNS = [asked(), {"role": "assistant", "content": "x"}]
IMAGE = asked()["content"][0]


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "another"}, 404, "model", "it is 'scripted'"),
        ({"messages": []}, 422, "messages", "at least 1"),
        ({"messages": TURNS}, 422, "messages", "must be a question"),
        ({"messages": [*TURNS, asked()]}, 422, "messages[2].content[0]", "about one picture"),
        (
            {"messages": [{"role": "user", "content": [IMAGE, *asked()["content"]]}]},
            422,
            "messages[0].content[1]",
            "about one picture",
        ),
        ({"messages": [asked(), asked()]}, 422, "messages[1].role", "take turns"),
        ({"messages": TURNS[1:]}, 422, "messages[0].role", "the user first"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            422,
            "messages[0].content",
            "no picture",
        ),
        (
            {"messages": [{"role": "system", "content": "be brief"}, asked()]},
            422,
            "messages[0].role",
            "the role 'system' is not supported",
        ),
        ({"messages": [asked(" ")]}, 422, "messages[0]", "the question is empty"),
        ({"messages": [asked("dog " * 3000)]}, 422, "messages", "the question is too long"),
        ({"messages": [asked("x" * 70000)]}, 422, "messages[0]", "65536 characters"),
        ({"messages": 101 * TURNS + [asked()]}, 422, "messages", "at most 200"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            422,
            "messages[0].content[0]",
            "'input_audio' is not supported",
        ),
        ({"messages": [asked(url=BROKEN)]}, 400, "messages[0].content[0]", "unknown format"),
        ({"messages": [asked(url=CUT)]}, 400, "messages[0].content[0]", "broken image"),
        (
            {"messages": [asked(url="data:image/png;base64,%%")]},
            400,
            "messages[0].content[0]",
            "no valid base64",
        ),
        (
            {"messages": [asked(url="data:image/png,abc")]},
            422,
            "messages[0].content[0]",
            "base64,… is needed",
        ),
        (
            {"messages": [asked(url=address(Image.new("RGB", (2000, 600))))]},
            400,
            "messages[0].content[0]",
            "1000000 pixels",
        ),
        (
            {"messages": [asked(url=address(Image.new("RGB", (900, 2))))]},
            400,
            "messages[0].content[0]",
            "at most 100 times",
        ),
        (
            {"messages": [asked(url="http://example.com/a.png")]},
            422,
            "messages[0].content[0]",
            "not fetched",
        ),
        ({"messages": [asked(url="/etc/passwd")]}, 422, "messages[0].content[0]", "data:image"),
        ({"messages": [asked(url="file:///etc/passwd")]}, 422, "messages[0].content[0]", "data:"),
        ({"temperature": 3}, 422, "temperature", "less than or equal to 2"),
        ({"temperature": 1e-9}, 422, "temperature", "0 or at least 0.01"),
        ({"top_p": 0.5}, 422, "top_p", "with a temperature above 0"),
        ({"n": 2}, 422, "n", "not supported"),
        ({"logprobs": True}, 422, "logprobs", "not supported"),
        ({"stop": ["on"]}, 422, "stop", "not supported"),
        ({"tools": [{"type": "function"}]}, 422, "tools", "not supported"),
        (
            {"response_format": {"type": "json_object"}},
            422,
            "response_format.type",
            "not supported",
        ),
        ({"max_tokens": 0}, 422, "max_tokens", "greater than or equal to 1"),
        ({"extra_body": {"stream": "yes"}}, 422, "stream", "boolean"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(running, change, status, param, words):
    error = running.refused(status, **change)
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert str(scripted_model().parent) not in error["message"]
    assert running.server.places == 0


def test_null_is_what_is_not_asked_for(running):
    nothing = dict.fromkeys(("stop", "tools", "temperature", "n", "stream_options"))
    assert running.complete(extra_body=nothing).choices


def test_requests_that_are_none(running):
    post, key = running.post, running.headers
    for content, status in ((b"{", 400), (b"\xff\xfe", 400), (b"[]", 422), (b"{}", 422)):
        found = httpx.post(post, content=content, headers=key)
        assert found.status_code == status and found.json()["error"]["message"]
    assert httpx.get(post, headers=key).status_code == 405
    found = httpx.get(f"{running.base}/v1/nothing").json()["error"]
    assert found["message"] == "there is no GET /v1/nothing"
    assert httpx.get(f"{running.base}/docs").status_code == 404


def test_too_large_a_request_is_not_kept(running):
    """Whether its length is told before or not; the client gets its answer."""
    large = json.dumps({"model": "scripted", "messages": [asked("x" * 2**21)]}).encode()
    parts = (large[i : i + 65536] for i in range(0, len(large), 65536))
    for content in (large, parts):
        found = httpx.post(running.post, content=content, headers=running.headers)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")


def test_the_key_is_needed_for_everything_but_health(running):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        for path in ("/v1/models", "/v1/models/scripted", "/metrics"):
            assert httpx.get(running.base + path, headers=headers).status_code == 401
        found = httpx.post(running.post, content=b"{}", headers=headers)
        assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
    assert httpx.get(f"{running.base}/health").json() == {"status": "ready"}
    assert [model.id for model in running.client.models.list()] == ["scripted"]
    assert running.client.models.retrieve("scripted").owned_by == "cores"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other")


def test_metrics_are_prometheus_text(running):
    done, tokens = running.metric('requests_total{status="200"}'), running.metric("masks_total")
    running.complete()
    assert running.metric('requests_total{status="200"}') == done + 1
    assert running.metric("masks_total") == tokens + 2
    assert running.metric("request_seconds_sum") >= running.metric("model_seconds_sum") > 0
    text = httpx.get(f"{running.base}/metrics", headers=running.headers).text
    running.server.totals["masks_total"] += 10**7
    assert running.metric("masks_total") == tokens + 2 + 10**7, "every digit"
    for name in api.METRICS:
        assert f"# HELP cores_{name} " in text and f"# TYPE cores_{name} " in text


def test_without_a_key_no_web_site_may_ask():
    """Neither by a name that suddenly means this machine nor in the name of a visitor."""
    with another("--allowed_hosts", "proxy.example") as found:
        models = f"{found.base}/v1/models"
        assert httpx.get(models).status_code == 200
        site = {"Origin": "http://evil.example"}
        for headers in ({"Host": "evil.example"}, site):
            answer = httpx.get(models, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_site")
            assert httpx.post(found.post, content=b"{}", headers=headers).status_code == 403
        assert httpx.get(models, headers={"Host": "proxy.example"}).status_code == 200
        assert found.complete().choices


# ------------------------------------------------------------------------- the line, and its ends


def test_a_full_line_refuses_and_loses_nobody(gate):
    with another("--queue", "1") as found:
        first = found.later(asked(seed=1))
        until(lambda: found.server.model.busy)
        second = found.later(asked(seed=2))
        until(lambda: found.server.places == 2)
        assert (found.metric("requests_running"), found.metric("requests_waiting")) == (1, 1)
        error = found.refused(429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert 1 <= int(error["headers"]["retry-after"]) <= 60
        gate.set()
        assert first.result(WAIT).choices and second.result(WAIT).choices
        assert found.complete().choices


def test_an_answer_has_a_time_limit(running, gate, monkeypatch):
    monkeypatch.setattr(running.server.args, "time_limit", 0.2)
    error = running.refused(504)
    assert (error["code"], error["type"]) == ("time_limit", "server_error")
    gate.set()
    monkeypatch.undo()
    assert running.complete().choices, "the model goes on with the next one"


def test_an_error_in_a_stream_is_its_last_event(running, monkeypatch):
    tell, said = api.Answering.tell, []

    def fail_after_two(answering, piece):
        said.append(piece)
        tell(answering, DataError("/secret/place") if len(said) == 3 else piece)

    monkeypatch.setattr(api.Answering, "tell", fail_after_two)
    pieces = []
    with pytest.raises(openai.APIError, match="secret"):
        pieces.extend(running.complete(stream=True))
    assert pieces
    until(lambda: running.server.places == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_worked_for(running, gate, stream):
    """Neither while it waits nor while it is answered."""
    model, request = running.server.model, {"model": "scripted", "messages": [asked("wheel")]}
    request |= {"stream": stream}
    before, body = model.answers, json.dumps(request).encode()
    host, port = running.base.removeprefix("http://").split(":")
    head = f"Host: x\r\nAuthorization: {running.headers['Authorization']}\r\n"
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    with contextlib.ExitStack() as clients:
        for _ in range(2):
            client = clients.enter_context(socket.create_connection((host, int(port)), WAIT))
            client.sendall(head.encode() + body)
        until(lambda: running.server.places == 2 and model.busy)
    until(lambda: running.server.places == 0)
    gate.set()
    assert running.complete().choices
    assert model.answers == before + 1


def test_a_client_that_leaves_its_stream_is_not_worked_for(running, monkeypatch):
    tell, slow = api.Answering.tell, threading.Event()
    told = []

    def tell_one(answering, piece):
        told.append(piece)
        tell(answering, piece)
        if len(told) == 2:
            assert slow.wait(WAIT)

    monkeypatch.setattr(api.Answering, "tell", tell_one)
    request = {"model": "scripted", "messages": [asked("wheel")], "stream": True}
    with httpx.stream("POST", running.post, json=request, headers=running.headers) as found:
        assert next(found.iter_lines()).startswith("data: ")
    until(lambda: running.server.places == 0)
    slow.set()
    until(lambda: not running.server.model.busy)
    assert len(told) <= 3 and isinstance(told[-1], api.GivenUp)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            503,
            "out_of_memory",
        ),
        (MemoryError(), 503, "out_of_memory"),
        (RuntimeError("/secret/place is broken"), 500, "failed"),
        (ValueError("/secret/place is broken"), 500, "failed"),
    ],
)
def test_what_fails_is_told_without_places(running, monkeypatch, capfd, error, status, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(api.Model, "_answered", fail)
    found = running.refused(status)
    assert found["code"] == code and found["type"] == "server_error"
    assert "secret" not in found["message"]
    assert ("secret" in capfd.readouterr().err) == (status == 500), "the log has it"
    monkeypatch.undo()
    assert running.complete().choices


def test_a_defect_before_the_model_is_told_alike(running, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("/secret/place is broken")

    monkeypatch.setattr(protocol, "read_request", fail)
    assert running.refused(500)["message"] == "the answer failed; the server's log says why"
    assert "secret" in capfd.readouterr().err and running.server.places == 0


def test_a_server_that_loads_says_so(running, monkeypatch):
    monkeypatch.setattr(running.server.model, "segmenter", None)
    found = httpx.get(f"{running.base}/health")
    assert (found.status_code, found.json()) == (503, {"status": "loading"})
    error = running.refused(503)
    assert error["code"] == "loading" and error["headers"]["retry-after"] == "1"


def test_a_server_that_stops_finishes_what_runs_and_refuses_the_rest(gate):
    with another() as found:
        first = found.later(asked(seed=1))
        until(lambda: found.server.model.busy)
        second = found.later(asked(seed=2))
        until(lambda: found.server.places == 2)
        found.web.should_exit = True
        with pytest.raises(openai.InternalServerError, match="being stopped"):
            second.result(WAIT)
        assert httpx.get(f"{found.base}/health").json() == {"status": "stopping"}
        assert found.refused(503)["code"] == "stopping"
        gate.set()
        assert first.result(WAIT).choices


def test_a_slow_sender_is_not_waited_for(running, monkeypatch):
    monkeypatch.setattr(api, "READ_WITHIN", 0.2)
    monkeypatch.setattr(api, "DISCARD_WITHIN", 0.1)
    host, port = running.base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), WAIT) as slow:
        key = running.headers["Authorization"].encode()
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n")
        slow.sendall(b"Authorization: " + key + b"\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
    until(lambda: running.server.places == 0)


# ------------------------------------------------------------------------ pictures from the web


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "::1", "::", "::ffff:127.0.0.1", "64:ff9b::7f00:1"),
        *("2002:7f00:1::", "fe80::1%eth0", "fc00::1"),
    ],
)
def test_no_address_of_this_network_is_public(address):
    assert not sent.is_public(address)
    assert sent.is_public("8.8.8.8") and sent.is_public("2606:4700:4700::1111")


class Web(http.server.BaseHTTPRequestHandler):
    """A server with a picture; it must not be reached where addresses are checked."""

    hosts: list[str] = []

    def do_GET(self):
        self.hosts.append(self.headers["Host"])
        picture_file = base64.b64decode(address(picture(9)).partition(",")[2])
        content = b"x" * 2**21 if self.path == "/large" else picture_file
        self.send_response({"/gone": 404, "/moved": 302}.get(self.path, 200))
        if self.path == "/moved":
            self.send_header("Location", "/picture")
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path == "/slow":
                for _ in range(50):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    Web.hosts.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://localhost:{found.server_address[1]}"
        found.shutdown()


def test_a_picture_is_fetched_only_from_the_open_web(running, web, monkeypatch, python):
    monkeypatch.setattr(running.server.args, "allow_urls", True)

    def refused(path: str, words: str, status: int = 400) -> None:
        error = running.refused(status, messages=[asked(url=path)])
        assert words in error["message"] and error["param"] == "messages[0].content[0]"

    for place in (web, "http://[::1]/a.png", "http://2130706433/", "http://127.1/a"):
        refused(place, "open internet", 422)
    assert Web.hosts == []
    monkeypatch.setattr(sent, "is_public", lambda address: address == "127.0.0.1")
    # The name has one address here.
    lookup = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: lookup)
    found = running.complete(asked(url=f"{web}/picture")).choices[0].message
    right = python.open(picture(9)).ask(QUESTION)
    assert (pixels_of(found.masks[-1]) == right.masks[0].mask).all()
    assert Web.hosts == [web.removeprefix("http://")]
    refused(f"{web}/gone", "answers 404")
    refused(f"{web}/moved", "answers 302")
    assert Web.hosts.count(Web.hosts[0]) == 3, "what moved is not followed"
    refused(f"{web}/large", "more than 1 MB")
    monkeypatch.setattr(sent, "FETCH_SECONDS", 0.3)
    refused(f"{web}/slow", "within 0.3 seconds")
    refused("http://", "could not be fetched")
    refused("https://localhost:1/a.png", "could not be fetched")


# ------------------------------------------------------------------------------------- the command


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.delenv("CORES_API_KEY", raising=False)
    flags = ["--version", "x", "--host", "0.0.0.0"]
    with pytest.raises(ValueError, match="CORES_API_KEY"):
        api.api_key(read_serve(flags))
    assert api.api_key(read_serve([*flags, "--no_auth"])) is None
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert api.api_key(read_serve(["--version", "x", "--host", host])) is None
    assert api.api_key(read_serve([*flags, "--api_key", "k"])) == "k"
    monkeypatch.setenv("CORES_API_KEY", " ")
    with pytest.raises(ValueError, match="CORES_API_KEY"):
        api.api_key(read_serve(flags))
    monkeypatch.setenv("CORES_API_KEY", "schlüssel")
    with pytest.raises(ValueError, match="ASCII"):
        api.api_key(read_serve(flags))
    monkeypatch.setenv("CORES_API_KEY", "k")
    assert api.api_key(read_serve(flags)) == "k"
    with pytest.raises(ValueError, match="drop one"):
        api.api_key(read_serve([*flags, "--no_auth"]))


@pytest.mark.parametrize("package", ["uvicorn", "fastapi"])
def test_a_missing_package_is_a_line(package, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "cores.utils.serving.api")
    monkeypatch.setitem(sys.modules, package, None)
    assert cores_main(["serve", "--version", "x"]) == 2
    error = capsys.readouterr().err
    assert (
        f"the package {package} is not installed" in error and 'pip install "cores[serve]"' in error
    )
    assert error.count("\n") == 1


def test_a_port_in_use_is_a_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert api.main(["--version", str(scripted_model()), "--port", port]) == 2
    error = capsys.readouterr().err
    assert "choose another port" in error and error.count("\n") == 1


LOADING = """
import time
from cores.dataset import command
from cores.utils.serving import api
api.load_segmenter = lambda _: time.sleep(600)
command.leave(api.main())
"""


def test_the_command_serves_until_it_is_stopped(tmp_path):
    """A folder without a model ends it by itself, a signal also while it loads."""
    program = [sys.executable, "-m", "cores", "serve", "--port", "0", "--version"]
    loading = [sys.executable, "-c", LOADING, "--port", "0", "--version", "x"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    how = {"cwd": ROOT, "env": environment, "text": True}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with contextlib.ExitStack() as started:

        def start(*argv: str) -> subprocess.Popen:
            process = started.enter_context(subprocess.Popen(argv, **how))
            started.callback(process.kill)
            return process

        def health(process: subprocess.Popen) -> str:
            process.base = process.stdout.readline().strip()
            return process.base.removesuffix("/v1") + "/health"

        wrong = start(*program, str(tmp_path))
        works = start(*program, str(scripted_model()))
        loads = start(*loading)
        assert httpx.get(health(loads)).json() == {"status": "loading"}
        loads.send_signal(signal.SIGTERM)
        ready = health(works)
        until(lambda: httpx.get(ready).status_code == 200)
        with openai.OpenAI(base_url=works.base, api_key="none") as client:
            name = client.models.list().data[0].id
            answer = client.chat.completions.create(model=name, messages=[asked()])
        assert answer.choices[0].message.masks
        works.send_signal(signal.SIGTERM)
        for process in (works, loads):
            assert process.wait(WAIT) == 130
            assert process.stderr.read() == "stopped\n"
        assert wrong.wait(WAIT) == 2
        error = wrong.stderr.read()
        assert error.startswith(f"error: {tmp_path}/") and error.count("\n") == 1


def test_a_refusal_has_the_form_of_openai():
    error = Refused(422, "n: one answer only", "n").to_dict()["error"]
    assert error["type"] == "invalid_request_error" and error["code"] is None
