"""A hub on this machine, with as much of huggingface.co as its client needs to make a repository,
put a commit into it and read it back: an address for ``HF_ENDPOINT``.

    with FakeHub() as hub:
        hub.files("me/toy")        # path -> content, of the last commit

Weights come by Git LFS, other files in the commit itself, as the real one asks for. Xet is not
spoken: HF_HUB_DISABLE_XET. Whoever writes needs TOKEN.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "secret" * 6
OWNER = "me"


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        """Repository -> its commits, each with all files."""
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        """What LFS has got: sha256 -> content."""
        self.asked: list[str] = []
        """Method and path of every request."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1]

    def sha(self, repo: str, number: int = -1) -> str:
        """The name of a commit."""
        number %= len(self.repos[repo])
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def commit(self, repo: str, revision: str) -> dict[str, bytes] | None:
        found = {self.sha(repo, n): files for n, files in enumerate(self.repos[repo])}
        return (self.repos[repo] or [{}])[-1] if revision == "main" else found.get(revision)

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        length = headers.pop("Content_Length", len(body))
        for name, value in {**headers, "Content_Length": length}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def parts(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_PUT(self) -> None:
        *_, sha = self.parts()
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == sha
        self.server.large[sha] = content
        self.answer({})

    def do_POST(self) -> None:
        parts, content, hub = self.parts(), self.body(), self.server
        if not self.known:
            self.answer({"error": "Invalid username or password."}, 401)
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(content)
            repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if not repo.startswith(f"{OWNER}/"):
                self.answer({"error": f"You have no rights under the namespace of {repo}"}, 403)
                return
            exists = repo in hub.repos
            if not exists:
                hub.repos[repo] = []
                if asked.get("private") or asked.get("visibility") == "private":
                    hub.private.add(repo)
            answer = {"url": f"{hub.address}/{repo}", "name": repo, "id": repo}
            self.answer(answer, 409 if exists else 200)
        elif parts == ["api", "validate-yaml"]:
            self.validate(json.loads(content)["content"])
        elif parts[-1:] == ["verify"]:
            self.answer({})
        elif parts[-2:] == ["objects", "batch"]:
            objects = [
                wanted | {"actions": {"upload": {"href": f"{hub.address}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(content)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "preupload" in parts:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif "commit" in parts:
            self.commit("/".join(parts[2:4]), content)
        else:
            self.answer({"error": "no such thing"}, 404)

    def validate(self, text: str) -> None:
        """What the real one says about a card without YAML, or with a name that is no id."""
        _, head, _ = text.split("---\n", 2)
        data = yaml.safe_load(head)
        names = [*data.get("datasets", []), *data.get("base_model", [])]
        bad = [name for name in names if not name.replace("/", "").replace("-", "").isidentifier()]
        if not isinstance(data.get("license"), str) or bad:
            self.answer({"errors": [{"message": f"not valid: {bad}"}], "warnings": []}, 400)
        else:
            self.answer({"errors": [], "warnings": []})

    def commit(self, repo: str, content: bytes) -> None:
        hub = self.server
        files = dict(hub.repos[repo][-1]) if hub.repos[repo] else {}
        for line in content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                hub.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        hub.repos[repo].append(files)
        address = f"{hub.address}/{repo}/commit/{hub.sha(repo)}"
        self.answer({"success": True, "commitOid": hub.sha(repo), "commitUrl": address})

    def do_GET(self) -> None:
        parts, hub = self.parts(), self.server
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in hub.repos or (repo in hub.private and not self.known):
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        what, revision, *rest = (parts[4:] if api else parts[2:]) or ("revision", "main")
        files = hub.commit(repo, revision)
        if files is None:
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            return
        sha = next((hub.sha(repo, n) for n, f in enumerate(hub.repos[repo]) if f is files), None)
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": repo, "sha": sha, "siblings": siblings, "private": False})
        elif what == "tree":
            self.answer(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]
            )
        elif "/".join(rest) in files:
            content = files["/".join(rest)]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, X_Repo_Commit=sha, ETag=etag, Content_Length=len(content))
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET
