"""A chat endpoint for tests and for the example of docs/generate.md: real HTTP, real faults, a
"model" that is a few rules.

    python -m tests.fake_chat_server --port 8123 --faults 429,500,cut,garbage,slow,truncated,schema

Every content of a request that was not seen before gets the next of the faults at its first attempt
and an answer at its second. The "model" sees what stands between the tags of a prompt; the same
prompt always gets the same answer.
"""

import argparse
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "cut", "garbage", "slow", "truncated", "schema")
WORDS = {
    "verb": (
        "borrow carry clean fetch fill fix hide hold lift move open pack push reach repair share"
        " store turn use wash"
    ),
    "noun": (
        "anchor basket bench bottle candle cradle drawer engine fence garden harness helmet kettle"
        " lantern mirror organ paddle pillow pocket pulley rudder saddle shutter spindle stove"
        " trolley turbine wagon whistle zipper"
    ),
    "look": (
        "bent broad curved flat hollow heavy narrow padded pointed ribbed rough round short slender"
        " smooth thick"
    ),
    "material": (
        "brass bone cloth clay copper cork felt glass horn iron leather paper plastic rubber steel"
        " wood"
    ),
}
VERBS, NOUNS, LOOKS, MATERIALS = (text.split() for text in WORDS.values())


def tagged(text: str, tag: str) -> str | None:
    found = re.search(rf"<{tag}>\s*(.*?)\s*</{tag}>", text, re.DOTALL)
    return found[1] if found else None


def dice(*parts: object) -> random.Random:
    return random.Random("|".join(map(str, parts)))


def plain(message: dict) -> str:
    content = message["content"]
    return (
        content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
    )


def reply_to(messages: list[dict], flawed: bool) -> str:
    """What the "model" answers. ``flawed``: some entries of its first reply break a rule, those
    after a complaint do not."""
    pictures = [
        part["image_url"]["url"]
        for m in messages
        if isinstance(m["content"], list)
        for part in m["content"][1:]
    ]
    if pictures:
        return describe(pictures[0])
    prompt = next(plain(message) for message in messages if message["role"] == "user")
    complaint = plain(messages[-1]) if len(messages) > 2 else None
    flawed = flawed and complaint is None
    if (things := tagged(prompt, "important_objects")) is not None:
        names = [line[2:].split(" | ")[0] for line in things.splitlines()]
        if complaint:
            names = re.search(r"only: (.*)\.$", complaint)[1].split(", ")
        return json.dumps({"pairs": question_pairs(names, tagged(prompt, "summary"), flawed)})
    many = int(tagged(prompt, "how_many"))
    if (domain := tagged(prompt, "domain")) is not None:
        count = int(re.search(r"(\d+) in number", complaint)[1]) if complaint else many
        return json.dumps({"pairs": part_pairs(domain, count, len(messages), flawed)})
    return (
        "Of course!\n```json\n"
        + json.dumps({"wordings": wordings(tagged(prompt, "request"), many, flawed)})
        + "\n```"
    )


def describe(url: str) -> str:
    assert url.startswith("data:image/jpeg;base64,"), url[:60]
    draw = dice(url)
    things = ", ".join(
        f"a {look} {noun}"
        for look, noun in zip(draw.sample(LOOKS, 5), draw.sample(NOUNS, 5), strict=True)
    )
    return (
        f"A quiet place by day with several things in it: {things}. Somebody has left in a hurry,"
        " and nothing was put away."
    )


def question_pairs(names: list[str], summary: str | None, flawed: bool) -> list[dict]:
    pairs = []
    for name in names:
        draw = dice(name, summary)
        question = (
            f"What would a visitor {draw.choice(VERBS)} before the {draw.choice(NOUNS)} could"
            f" {draw.choice(VERBS)} again?"
        )
        pairs.append(
            {
                "object": name,
                "question": question,
                "answer": f"The {name}, because nothing else here would do it.",
            }
        )
    if flawed:
        pairs[0] |= {"question": f"Where would a visitor find the {names[0]} that is needed here?"}
        pairs.insert(
            1,
            {
                "object": "unicorn",
                "question": "What could carry a rider to the moon?",
                "answer": "It is the unicorn.",
            },
        )
    return pairs


def part_pairs(domain: str, count: int, turn: int, flawed: bool) -> list[dict]:
    draw = dice(domain, turn)
    pairs = []
    for whole, other in zip(draw.sample(NOUNS, count), draw.sample(NOUNS, count), strict=True):
        look, material = draw.choice(LOOKS), draw.choice(MATERIALS)
        question = (
            f"Which part of the {domain} {whole} lets people {draw.choice(VERBS)} its {other}?"
        )
        answer = (
            f"It typically appears on one side of the {domain} {whole}. It is usually a {look}"
            f" {other} piece of {material}."
        )
        pairs.append({"q": question, "a": answer})
    if flawed:
        pairs[0] = pairs[0] | {"a": "[SEG] is where it appears, and nothing else is known of it."}
    return pairs


def wordings(request: str, count: int, flawed: bool) -> list[str]:
    text, sentence = request[0].lower() + request[1:], request[-1] in ".?!"
    openings = [
        "Looking closely at whatever is visible here, ",
        "After a careful and patient search of everything, ",
    ]
    openings += [
        "For somebody who has never been around, ",
        "Taking all of this together as it appears, ",
    ]
    phrases = [
        "exactly that which people call ",
        "the visible thing known as ",
        "whatever may count as ",
        "precisely and solely ",
    ]
    made = [opening + text for opening in (openings if sentence else phrases)][:count]
    return [f"{text} (its mask is at [12, 40])", *made[1:]] if flawed else made


@dataclass
class Served:
    """One request as the server saw it."""

    content: str
    """Hash of the body."""
    outcome: str
    """"answer" or the fault."""
    at: float
    """time.monotonic() of its arrival."""
    headers: dict = field(repr=False, default_factory=dict)
    body: dict = field(repr=False, default_factory=dict)


class FakeChatServer(ThreadingHTTPServer):
    """Use as a context manager; ``url`` is for --base_url."""

    daemon_threads = True

    def __init__(
        self,
        port: int = 0,
        faults: tuple[str, ...] = (),
        flawed: bool = False,
        slow: float = 1.0,
        always: bool = False,
    ):
        """``slow``: seconds of the fault "slow". ``always``: every attempt gets the first fault.
        ``flawed``: see reply_to."""
        super().__init__(("127.0.0.1", port), Handler)
        self.faults, self.flawed, self.slow, self.always = faults, flawed, slow, always
        self.served: list[Served] = []
        self.under_way = self.most_under_way = 0
        self.delay = 0.0
        # requests from this number on get no answer; the test kills who asked
        self.hold_from: int | None = None
        self.go = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answers(self) -> list[str]:
        """The contents that were answered, in order."""
        return [served.content for served in self.served if served.outcome == "answer"]

    def __enter__(self) -> "FakeChatServer":
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_) -> None:
        self.go.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no error of ours."""

    def arrive(self, raw: bytes, headers: dict) -> Served:
        """Notes the request and decides what becomes of it."""
        content = hashlib.sha256(raw).hexdigest()
        with self.lock:
            first = all(served.content != content for served in self.served)
            known = len({served.content for served in self.served})
            fault = (
                self.faults[known % len(self.faults)]
                if self.faults and (first or self.always)
                else "answer"
            )
            self.served.append(Served(content, fault, time.monotonic(), headers, json.loads(raw)))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            return self.served[-1]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: FakeChatServer

    def log_message(self, *_) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions", self.path
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        number = len(self.server.served)
        served = self.server.arrive(raw, dict(self.headers))
        try:
            if self.server.hold_from is not None and number >= self.server.hold_from:
                served.outcome = "held"  # never answered: whoever asked has been killed meanwhile
                self.server.go.wait()
                self.close_connection = True
                return
            time.sleep(self.server.delay)
            getattr(self, f"fault_{served.outcome}", self.answer)(served)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def send(self, status: int, text: str, promise: int | None = None, **headers: str) -> None:
        """``promise``: a longer length than is sent."""
        raw = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(promise or len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def completion(self, served: Served) -> str:
        messages = served.body["messages"]
        text = reply_to(messages, self.server.flawed)
        asked = sum(len(plain(message)) for message in messages)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": asked // 4, "completion_tokens": len(text) // 4}
        return json.dumps(
            {"id": "fake", "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    def answer(self, served: Served) -> None:
        self.send(200, self.completion(served))

    def error(self, status: int, message: str, **headers: str) -> None:
        code = {"insufficient_quota": "insufficient_quota"}.get(message)
        self.send(status, json.dumps({"error": {"message": message, "code": code}}), **headers)

    def fault_429(self, _: Served) -> None:
        self.error(429, "slow down", Retry_After="0.2")

    def fault_500(self, _: Served) -> None:
        self.error(500, "something broke")

    def fault_cut(self, _: Served) -> None:
        # a reset instead of a proper end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def fault_garbage(self, _: Served) -> None:
        self.send(200, '<html>{"choices": [{]')

    def fault_slow(self, served: Served) -> None:
        """Headers at once, then the body drop by drop, so that no single read times out."""
        text = self.completion(served)
        self.send(200, "", promise=len(text.encode()))
        end = time.monotonic() + self.server.slow
        while time.monotonic() < end:
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.02)
        self.close_connection = True

    def fault_truncated(self, served: Served) -> None:
        text = self.completion(served)
        self.send(200, text[: len(text) // 2], promise=len(text.encode()))
        self.close_connection = True

    def fault_schema(self, _: Served) -> None:
        self.send(200, json.dumps({"choices": [{"text": "no message here"}]}))

    def fault_401(self, _: Served) -> None:
        self.error(401, f"wrong key: {self.headers['Authorization']}")

    def fault_400(self, _: Served) -> None:
        self.error(400, "this content is not served")

    def fault_quota(self, _: Served) -> None:
        self.error(429, "insufficient_quota")

    def fault_now(self, _: Served) -> None:
        self.error(429, "slow down, but come back at once", Retry_After="0")

    def fault_long(self, _: Served) -> None:
        self.error(429, "come back tomorrow", Retry_After="86400")

    def fault_redirect(self, _: Served) -> None:
        self.send(307, "", Location="http://127.0.0.1:9/v1/chat/completions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--faults", default="", help=f"joined by commas, of {', '.join(FAULTS)}")
    parser.add_argument("--flawed", action="store_true", help="the first replies break rules")
    args = parser.parse_args()
    server = FakeChatServer(
        args.port, tuple(name for name in args.faults.split(",") if name), args.flawed
    )
    print(f"serving at {server.url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
