"""A local server that speaks as much of the Hub's protocol as its own client needs.

Files in git travel in the answer itself; `.safetensors` and `.pth` are large files, which the Hub
answers with a redirect to another host. Everything lives in memory.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".pth")


@dataclass
class Repository:
    """commits: id → files; branches: name → commit id. Gated ones open to `accepted` tokens."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    accepted: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add `files` to a branch as one commit."""
        merged = {**self.files(branch), **files}
        text = f"{len(self.commits)} {sorted((k, _sha256(v)) for k, v in merged.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = merged
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str) -> dict[str, bytes]:
        return dict(self.commits.get(self.resolve(revision) or "", {}))


@dataclass(frozen=True)
class Request:
    """headers: by their names in small letters."""

    method: str
    path: str
    headers: dict[str, str]


class HubServer(ThreadingHTTPServer):
    """Runs in its own thread inside `with`.

    log: every request. cuts: after how many bytes the next bodies of a large file break off.
    writers: tokens that may push; None lets every token.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.cuts: list[int] = []
        self.writers: set[str] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def other_host(self) -> str:
        """The same server under another origin, as the Hub's large files have one."""
        return f"http://localhost:{self.server_port}"

    def bodies(self) -> list[str]:
        """Paths of the files whose contents were sent."""
        return [
            r.path for r in self.log if r.method == "GET" and re.search("/resolve/|/cdn/", r.path)
        ]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.log.append(Request(self.command, unquote(self.path), headers))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/cdn/(\w+)", path):
            self._send_file(self.server.objects[match[1]], match[1], large=True)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._info(match[1])
        else:
            self._answer(404, {"error": "no such page"})

    def do_PUT(self) -> None:
        oid = self.path.removeprefix("/upload/")
        content = self._body()
        if _sha256(content) == oid:
            self.server.objects[oid] = content
            self._answer(200)
        else:
            self._answer(400, {"error": "the content does not have this SHA-256"})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        repository = r"([^/]+/[^/]+)"
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif not self._may_write():
            self._answer(403, {"error": "read-only token"}, {"X-Error-Message": "read-only token"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(rf"/api/models/{repository}/preupload/(.+)", path):
            self._preupload(json.loads(body))
        elif match := re.fullmatch(rf"/{repository}\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(rf"/api/models/{repository}/branch/(.+)", path):
            self._branch(self.server.repositories[match[1]], unquote(match[2]))
        elif match := re.fullmatch(rf"/api/models/{repository}/commit/(.+)", path):
            self._commit(match[1], unquote(match[2]), body.splitlines())
        else:
            self._answer(404, {"error": "no such page"})

    def _info(self, name: str) -> None:
        if name in self.server.repositories:
            private = self.server.repositories[name].private
            self._answer(200, {"id": name, "private": private})
        else:
            self._answer(401, headers={"X-Error-Code": "RepoNotFound"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._answer(401, headers={"X-Error-Code": "RepoNotFound"})
            return
        token = self._token()
        if repository.gated and token not in repository.accepted:
            self._answer(403 if token else 401, headers={"X-Error-Code": "GatedRepo"})
            return
        commit = repository.resolve(revision)
        if commit is None:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        headers = {"X-Repo-Commit": commit}
        content = repository.commits[commit].get(file)
        if content is None:
            self._answer(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        elif file.endswith(LARGE):
            oid = _sha256(content)
            self.server.objects[oid] = content
            headers["X-Linked-Etag"] = f'"{oid}"'
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"{self.server.other_host}/cdn/{oid}"
            self._answer(302, headers=headers)
        else:
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            self._send_file(content, blob, headers)

    def _send_file(
        self, content: bytes, etag: str, headers: dict[str, str] | None = None, large: bool = False
    ) -> None:
        start, status = 0, 200
        headers = {**(headers or {}), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        self._head(status, len(body), headers)
        if self.command == "HEAD":
            return
        if large and self.server.cuts:
            self.wfile.write(body[: self.server.cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.server.repositories
        if not known:
            # `visibility` since huggingface_hub 2, `private` before.
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.server.repositories[name] = Repository(private=private)
            self.server.repositories[name].commit({})
        url = f"{self.server.endpoint}/{name}"
        self._answer(409 if known else 200, {"url": url, "error": "exists already"})

    def _preupload(self, wanted: dict[str, Any]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in wanted["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.objects:
                href = f"{self.server.endpoint}/upload/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _branch(self, repository: Repository, branch: str) -> None:
        if branch in repository.branches:
            self._answer(409, {"error": "exists already"})
        else:
            repository.branches[branch] = repository.branches["main"]
            self._answer(200, {})

    def _commit(self, name: str, branch: str, lines: list[bytes]) -> None:
        files = {}
        for line in lines:
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        oid = self.server.repositories[name].commit(files, branch)
        url = f"{self.server.endpoint}/{name}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _may_write(self) -> bool:
        return self.server.writers is None or self._token() in self.server.writers

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self._head(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
