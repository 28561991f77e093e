"""Model folders on their way to the hub. The token is huggingface_hub's own: that of ``hf auth
login`` or HF_TOKEN, unless one is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from cores.model.card import CARD, HERE
from cores.model.checkpoints.source import PROCESSOR_FILE, TOKENIZER_PARTS, TOKENIZERS

# What a model folder holds, ours or in LISA's layout; other files in it are somebody's own.
FILES = (CARD, "LICENSE*", "*config.json", PROCESSOR_FILE, "*.jinja") + (
    *("model*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *(*TOKENIZERS, *TOKENIZER_PARTS, "merges.txt"),
)
FOLDERS = ("", "clip")
WHO = "run `hf auth login`, or set HF_TOKEN to a token that may write"


def model_files(folder: Path) -> list[Path]:
    """The files of a model in ``folder``, its card among them."""
    files = (file for name in FOLDERS for file in sorted((folder / name).glob("*")))
    return [f for f in files if f.is_file() and any(fnmatch(f.name, name) for name in FILES)]


def push_folder(
    folder: Path,
    repo: str,
    *,
    card: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    message: str = "Upload model",
    **commit: Any,
) -> str:
    """Puts the model in ``folder`` into the repository ``repo``, which is made if it is not there,
    as one commit; returns the commit's address.

    ``card``: README.md's text, in place of the folder's; examples in it get the repository's name.
    ``commit``: ``revision``, ``create_pr`` … of ``HfApi.create_commit``. Raises ValueError, one
    line, where the hub cannot be reached or refuses.
    """
    with _one_line(repo):
        # Without a token, every request would be refused, the last one after a long upload.
        if not (token if isinstance(token, str) else get_token()):
            raise ValueError(f"{repo}: nobody is logged in to the hub; {WHO}")
        api = HfApi(token=token)
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        operations = []
        for file in model_files(folder):
            if file != folder / CARD:
                path = file.relative_to(folder).as_posix()
                operations.append(CommitOperationAdd(path, str(file)))
            elif card is None:
                card = file.read_text(encoding="utf-8")
        if card is not None:
            named = card.replace(HERE, HERE.replace('"."', f'"{name}"'))
            operations.append(CommitOperationAdd(CARD, named.encode()))
        made = api.create_commit(name, operations, commit_message=message, **commit)
        return str(made.pr_url or made.commit_url)


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    try:
        yield
    except OfflineModeIsEnabled:
        raise ValueError(f"{repo}: the hub is shut off by HF_HUB_OFFLINE; unset it") from None
    except HFValidationError as error:
        raise ValueError(f"{repo}: is no name of a repository ({error})") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = " ".join(str(error.server_message or error).split())[:300]
        hint = f"; {WHO} there" if status in (401, 403) else ""
        raise ValueError(f"{repo}: the hub refuses it ({status}: {reason}){hint}") from None
    except (httpx2.HTTPError, ConnectionError, RuntimeError) as error:  # The last, in an upload.
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(f"{repo}: the hub cannot be reached ({reason}); try again") from None
