"""Several processes: what keeps them from meeting, and what one of them tells the others."""

import contextlib
import io
import os
import re
import socket
import threading
from pathlib import Path
from unittest import mock

from cores import train_ds
from cores.utils.lifeline import Lifeline
from tests.faults.case import case


def refused(code: int, *words: str, **environment: str) -> str:
    """The one line with which train_ds.py ends in this environment, as one of several ranks."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port()), "CORES_START_TIMEOUT": "1"} | environment
    place = {name: value for name, value in place.items() if value}
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, others | place, clear=True),
        mock.patch("torch.distributed.is_initialized", return_value=False),
        contextlib.redirect_stderr(said),
    ):
        found = train_ds.main(["--version", "/nowhere"])
    line = said.getvalue()
    assert found == code, line
    assert line.startswith("error: ") and line.count("\n") == 1, line
    assert all(word in line for word in words), line
    return line


VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@case(
    "`RANK` set by hand or left over in the environment, `WORLD_SIZE` not",
    "refused",
    "the line names the variables that lack and those a launcher sets",
)
def rank_without_world(tmp_path: Path) -> None:
    refused(2, "WORLD_SIZE not set", "torchrun, deepspeed", WORLD_SIZE="")
    refused(2, "RANK not set, but", "unset them to run in one process", RANK="")
    refused(2, "MASTER_ADDR not set", MASTER_ADDR="")


@case(
    "a rank, a port or a number of ranks that is none (`RANK=2` of 2, `MASTER_PORT=node1`)",
    "refused",
    "the line names the variable and its value",
)
def variables_that_are_no_numbers(tmp_path: Path) -> None:
    refused(2, "RANK is 2, but WORLD_SIZE 2", RANK="2")
    refused(2, "MASTER_PORT is 'node1'", MASTER_PORT="node1")
    refused(2, "MASTER_PORT is 99999", MASTER_PORT="99999")
    refused(2, "WORLD_SIZE is '-2'", WORLD_SIZE="-2")
    refused(2, "CORES_START_TIMEOUT is 'soon'", CORES_START_TIMEOUT="soon")


@case(
    "`MASTER_ADDR` that does not resolve",
    "refused",
    "the line names it and --master_addr, before anything is waited for",
)
def address_that_does_not_resolve(tmp_path: Path) -> None:
    name = "no-such-host.invalid"
    refused(2, f"MASTER_ADDR {name!r} cannot be resolved", "--master_addr", MASTER_ADDR=name)


@case(
    "the port of the ranks, 29500 for everybody, is another program's",
    "refused",
    "rank 0 offers a free port for --master_port; others say that it is not rank 0 that answers",
)
def port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        refused(2, f"port {port} of 127.0.0.1 cannot be used", "--master_port", MASTER_PORT=port)

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        refused(4, "is not rank 0: another program has the port", RANK="1", MASTER_PORT=port)


@case(
    "a rank that never comes",
    "refused",
    "the others end after 20 s (300 s on several machines, or CORES_START_TIMEOUT), exit code 4",
)
def rank_that_never_comes(tmp_path: Path) -> None:
    refused(4, "rank 1 of 2 did not come within 1 s", "CORES_START_TIMEOUT")
    refused(4, "rank 0 did not come within 1 s", RANK="1")


@case(
    "a rank that fails or is killed while another waits for it, or computes for hours",
    "refused",
    "all end within seconds, with the words of the one that failed, exit code 4",
)
def last_words(tmp_path: Path) -> None:
    for end, expected in (
        (lambda line: line.tell(2, "/data: does not exist"), "rank 1 on .*: /data: does not exist"),
        (lambda line: line.others[0].socket.shutdown(2), "rank 1 on .*: ended without a word"),
    ):
        ranks = meet()
        for line in ranks:
            line.watch()
        # Who asks ends by itself; otherwise the process would be ended now.
        ranks[1].leaving = True
        end(ranks[1])
        heard = [rank.lost(5) for rank in (ranks[0], ranks[2])]
        assert len(heard) == 2 and all(words.code_for_others == 4 for words in heard)
        assert all(re.match(expected, str(words)) for words in heard), heard


def meet() -> list[Lifeline]:
    """Three ranks that have met, as threads of this process."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    ranks = [Lifeline(rank, 3) for rank in range(3)]
    threads = [
        threading.Thread(target=ranks[0].gather, args=(server, "t", 10, 1)),
        *(
            threading.Thread(target=rank.join, args=("127.0.0.1", port, "t", 10))
            for rank in ranks[1:]
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(rank.others) for rank in ranks] == [2, 1, 1]
    return ranks
