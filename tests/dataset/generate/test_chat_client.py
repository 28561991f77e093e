"""The client against a real server with real faults: what is sent again, what is not, what is
written down."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import httpx2
import pytest

from cores.dataset.files.errors import DataError
from cores.dataset.generate.client import (
    Abort,
    ChatClient,
    ChatError,
    Endpoint,
    Pacer,
    Request,
    Stopped,
    read_reply,
    retry_after,
)
from cores.dataset.generate.journal import Journal, read_answers
from tests.fake_chat_server import FakeChatServer

KEY = "sk-very-secret-0123456789"


def request(text: str = "the red bus", number: int = 0) -> Request:
    content = f"<request>{text}</request><how_many>2</how_many>"
    return Request("rephrase", text, [{"role": "user", "content": content}], number=number)


class Client(ChatClient):
    """A client with a journal in ``folder``; a context manager."""

    def __init__(self, url: str, folder: Path, per_minute: float = 0, **fields):
        stop = threading.Event()
        endpoint = Endpoint(url, "fake", **({"backoff": 0.01, "timeout": 30.0} | fields))
        super().__init__(endpoint, Journal(folder / "journal.jsonl"), Pacer(per_minute, stop), stop)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self.journal.close()


def attempts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", "HTTP 429: slow down"),
        ("500", "HTTP 500: something broke"),
        ("cut", "Error"),
        ("garbage", "not JSON"),
        ("truncated", "RemoteProtocolError"),
        ("schema", "no chat completion"),
    ],
)
def test_a_fault_is_written_down_and_the_request_sent_again(tmp_path, fault, said):
    with FakeChatServer(faults=(fault,)) as server, Client(server.url, tmp_path) as client:
        answer = client.ask(request())
        assert client.ask(request()) == answer
    assert [served.outcome for served in server.served] == [fault, "answer"]
    failed, good = attempts(tmp_path)
    assert said in failed["error"] and failed["answer"] is None
    assert good["error"] is None and good["answer"]["text"] == answer.text
    assert good["request"]["messages"] == request().messages and "choices" in good["reply"]
    assert read_answers(tmp_path / "journal.jsonl")[0] == {good["key"]: answer}


def test_a_server_that_drips_does_not_hold_us(tmp_path):
    with FakeChatServer(faults=("slow",), slow=5.0, always=True) as server:
        started = time.monotonic()
        with (
            Client(server.url, tmp_path, timeout=0.3, retries=0) as client,
            pytest.raises(ChatError, match=r"within 0\.3 s"),
        ):
            client.ask(request())
        assert time.monotonic() - started < 4  # the server goes on for 5 s


def test_retry_after_is_kept(tmp_path):
    with FakeChatServer(faults=("429",)) as server, Client(server.url, tmp_path) as client:
        client.ask(request())
        first, second = server.served
    assert second.at - first.at >= 0.2


def test_a_server_that_says_at_once_is_not_stormed(tmp_path):
    with (
        FakeChatServer(faults=("now",)) as server,
        Client(server.url, tmp_path, backoff=0.4) as client,
    ):
        client.ask(request())
        first, second = server.served
    assert second.at - first.at >= 0.2  # 0.4, less a jitter of at most a half


def test_a_pause_holds_every_thread():
    pacer = Pacer(0, threading.Event())
    started = time.monotonic()
    pacer.pause(0.2)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: pacer.wait(), range(3)))
    assert time.monotonic() - started >= 0.2


def test_retry_after_as_number_date_and_nonsense():
    def seconds(value: str) -> float | None:
        return retry_after(httpx2.Headers({"Retry-After": value}))

    assert seconds("1.5") == 1.5
    assert seconds("-3") == 0
    assert 8 < seconds(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert seconds(formatdate(time.time() - 10, usegmt=True)) == 0
    assert [seconds(value) for value in ("nan", "soon", "")] == [None, None, None]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("401", "HTTP 401"),
        ("quota", "insufficient_quota"),
        ("redirect", "HTTP 307"),
        ("long", "asks to wait 86400 s, longer than --max_wait 600"),
    ],
)
def test_what_no_attempt_can_heal_ends_the_run_at_once(tmp_path, fault, said):
    with (
        FakeChatServer(faults=(fault,), always=True) as server,
        Client(server.url, tmp_path) as client,
    ):
        with pytest.raises(Abort, match=said):
            client.ask(request())
        assert len(server.served) == 1


def test_a_content_that_is_refused_fails_alone(tmp_path):
    with FakeChatServer(faults=("400", "answer")) as server, Client(server.url, tmp_path) as client:
        with pytest.raises(ChatError, match="HTTP 400: this content is not served"):
            client.ask(request("bad"))
        assert client.ask(request("good")).text
        assert len(server.served) == 2


def test_attempts_are_counted(tmp_path):
    with (
        FakeChatServer(faults=("500",), always=True) as server,
        Client(server.url, tmp_path, retries=2) as client,
        pytest.raises(ChatError, match="no answer after 3 attempts; the last: HTTP 500"),
    ):
        client.ask(request())
    assert len(server.served) == len(attempts(tmp_path)) == 3


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path):
    with (
        FakeChatServer(faults=("401",), always=True) as server,
        Client(server.url, tmp_path, api_key=KEY) as client,
    ):
        with pytest.raises(Abort) as error:  # the server's message repeats the key
            client.ask(request())
        assert server.served[0].headers["Authorization"] == f"Bearer {KEY}"
        assert KEY not in str(error.value) and KEY not in repr(client.endpoint)
    assert KEY not in (tmp_path / "journal.jsonl").read_text()
    assert "Bearer ***" in (tmp_path / "journal.jsonl").read_text()


def test_a_word_that_stands_for_a_key_is_left_in_replies(tmp_path):
    """Local servers take any key, "red" for example; an answer must not be changed for it."""
    with FakeChatServer() as server, Client(server.url, tmp_path, api_key="red") as client:
        assert "red bus" in client.ask(request()).text


def test_pace_and_concurrency(tmp_path):
    with FakeChatServer() as server, Client(server.url, tmp_path, per_minute=1200) as client:
        server.delay = 0.1
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(client.ask, [request(f"thing {i}") for i in range(8)]))
        at = [served.at for served in server.served]
    # 1200 a minute: one every 0.05 s; starts are exact, arrivals a little later
    assert at[-1] - at[0] >= 0.9 * 7 * 0.05
    assert 1 < server.most_under_way <= 3


def test_equal_requests_at_the_same_time_are_one(tmp_path):
    with FakeChatServer() as server, Client(server.url, tmp_path) as client:
        server.delay = 0.1
        with ThreadPoolExecutor(4) as pool:
            answers = set(pool.map(client.ask, [request()] * 4))
        assert len(answers) == len(server.served) == 1
        client.ask(request(number=1))  # to ask once more is another request
        assert len(server.served) == 2


def test_a_stopped_run_sends_nothing(tmp_path):
    with FakeChatServer() as server, Client(server.url, tmp_path) as client:
        client._stop.set()
        with pytest.raises(Stopped):
            client.ask(request())
        assert server.served == []


@pytest.mark.parametrize(
    ("content", "text", "finish"),
    [
        ({"choices": [{"message": {"content": "yes"}, "finish_reason": None}]}, "yes", "stop"),
        (
            {"choices": [{"message": {"content": "cut o"}, "finish_reason": "length"}]},
            "cut o",
            "length",
        ),
        ({"choices": [{"message": {"content": None, "refusal": "I will not"}}]}, "", "refusal"),
        (
            {
                "choices": [
                    {
                        "message": {
                            "content": [
                                {"type": "text", "text": "a"},
                                {"type": "text", "text": "b"},
                            ]
                        }
                    }
                ]
            },
            "ab",
            "stop",
        ),
    ],
)
def test_dialects_of_the_reply(content, text, finish):
    answer = read_reply(200, httpx2.Headers(), json.dumps(content))
    assert (answer.text, answer.finish, answer.tokens_in) == (text, finish, None)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": 3}}]}', "[" * 10000],
)
def test_replies_that_are_no_answers(content):
    assert read_reply(200, httpx2.Headers(), content).retried


def test_a_torn_line_is_cut_off_and_a_damaged_one_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    with FakeChatServer() as server:
        with Client(server.url, tmp_path) as client:
            answer = client.ask(request())
        whole = path.read_bytes()
        path.write_bytes(whole + whole[: len(whole) // 2])  # killed while writing the second record
        with Client(server.url, tmp_path) as client:
            assert client.ask(request()) == answer
            client.ask(request("another"))
        assert len(server.served) == 2
        assert [record["item"] for record in attempts(tmp_path)] == ["the red bus", "another"]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match="line 1 is damaged"):
        Journal(path)


def test_two_runs_cannot_write_one_journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(DataError, match="another run writes to this journal"):
        Journal(tmp_path / "journal.jsonl")
    journal.close()
    Journal(tmp_path / "journal.jsonl").close()
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"], (
        "the lock's file is gone"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base_url": "localhost:8000"}, "is not an address"),
        ({"base_url": "https://me:pass@host/v1"}, "belongs in the environment"),
        ({"model": ""}, "--model is empty"),
        ({"api_key": "schlüssel"}, "no key has"),
    ],
)
def test_endpoints_that_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        Endpoint(**({"base_url": "http://host/v1", "model": "m"} | fields))


def test_extra_fields_change_the_request_and_null_removes_one():
    body = Endpoint("http://host/v1", "m", extra={"top_p": 0.9, "temperature": None}).body(
        request()
    )
    assert body["top_p"] == 0.9 and "temperature" not in body
