"""A small Hub on 127.0.0.1: real files over the HTTP API that huggingface_hub uses, for clients with HF_ENDPOINT set.

It answers model info, tree, resolve (safetensors by redirect to another host, as the Hub does for large files),
range requests, repository creation, preupload and commit. Faults can be set per repository. Not a test itself.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "tester", "hf_good"


@dataclass
class Repo:
    """A model repository: its states by commit, oldest first, each `{path: content}`."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # one for each coming GET of weights: "cut" or "drop"

    def commit(self, files: dict[str, bytes]) -> str:
        """Add files to the newest state; returns the new commit."""
        state = {**(list(self.commits.values())[-1] if self.commits else {}), **files}
        digest = hashlib.sha1(repr((len(self.commits), sorted(state.items()))).encode())
        self.commits[digest.hexdigest()] = state
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch ("main") or commit hash refers to."""
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


class Hub(ThreadingHTTPServer):
    """Use as a context manager; `url` is the value for HF_ENDPOINT.

    Attributes:
        repos: by id.
        log: every request as (method, path without the query).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files_url = f"http://localhost:{self.server_port}"  # a different host for large files

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def add(self, repo_id: str, folder: Path, private: bool = False, faults: list[str] | None = None) -> str:
        """Commit all files of a folder to a new or existing repository; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        repo.faults = faults or []
        files = (path for path in folder.rglob("*") if path.is_file())
        return repo.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

    def downloads(self, repo_id: str) -> Counter[str]:
        """How often each file of a repository was requested with GET."""
        pattern = re.compile(rf"/({repo_id}/resolve|files/{repo_id})/[^/]+/(?P<file>.+)")
        matches = (pattern.fullmatch(path) for method, path in self.log if method == "GET")
        return Counter(match["file"] for match in matches if match)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        """Requests are kept in `Hub.log`, not printed."""

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        self.server.log.append((self.command, path))
        if authorization not in (None, f"Bearer {TOKEN}"):
            return self.fail(401, "", "Invalid credentials in Authorization header")
        self.is_known = authorization is not None
        for pattern, handle in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match:
                return handle(self, **match.groupdict())
        return self.fail(404, "", f"No such route: {self.command} {path}")

    def found(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and the commit; None if an error was sent."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self.is_known):
            return self.fail(404 if self.is_known else 401, "RepoNotFound", "Repository not found")
        commit = repo.resolve(revision)
        return (repo, commit) if commit else self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def model_info(self, repo_id: str, revision: str | None = None) -> None:
        if found := self.found(repo_id, revision or "main"):
            repo, commit = found
            siblings = [{"rfilename": path} for path in repo.commits[commit]]
            self.answer({"id": repo_id, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, repo_id: str, revision: str, folder: str | None = None) -> None:
        if found := self.found(repo_id, revision):
            prefix = f"{folder}/" if folder else ""
            files = {path: c for path, c in found[0].commits[found[1]].items() if path.startswith(prefix)}
            if not files:
                return self.fail(404, "EntryNotFound", f"{folder} does not exist on {revision}")
            entries: list[dict[str, Any]] = []
            for path, content in files.items():
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
                if is_large(path):
                    entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                entries.append(entry)
            self.answer(entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if found := self.found(repo_id, revision):
            repo, commit = found
            headers = {"X-Repo-Commit": commit}
            content = repo.commits[commit].get(path)
            if content is None:
                return self.fail(404, "EntryNotFound", "Entry not found", headers)
            if is_large(path):
                location = f"{self.server.files_url}/files/{repo_id}/{commit}/{path}"
                linked = {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
                return self.send(302, b"", headers | linked | {"Location": location})
            self.send_range(content, headers | {"ETag": f'"{blob_id(content)}"'})

    def large_file(self, repo_id: str, commit: str, path: str) -> None:
        """The content that signed URLs lead to: no authentication, and faults occur."""
        repo = self.server.repos[repo_id]
        fault = repo.faults.pop(0) if repo.faults and self.command == "GET" else None
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        self.send_range(repo.commits[commit][path], {}, cut=fault == "cut")

    def create(self) -> None:
        if not self.is_known:
            return self.fail(401, "", "Invalid username or password.")
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repos:
            return self.answer(answer | {"error": "You already created this model repo"}, status=409)
        self.server.repos[repo_id] = Repo(private=request.get("visibility") == "private")
        self.server.repos[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.answer(answer)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            yaml.safe_load(content.split("---")[1])
            self.answer({"errors": [], "warnings": []})
        except (IndexError, yaml.YAMLError) as error:
            self.answer({"errors": [{"message": str(error)}], "warnings": []}, status=400)

    def preupload(self, repo_id: str, revision: str) -> None:
        """All files are sent inside the commit, which the Hub allows for small ones."""
        if self.is_known and self.found(repo_id, revision):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})

    def commit(self, repo_id: str, revision: str) -> None:
        if self.is_known and (found := self.found(repo_id, revision)):
            items = [json.loads(line) for line in self.body.splitlines()]
            files = {item["value"]["path"]: item["value"]["content"] for item in items if item["key"] == "file"}
            commit = found[0].commit({path: base64.b64decode(content) for path, content in files.items()})
            url = f"{self.server.url}/{repo_id}/commit/{commit}"
            self.answer({"success": True, "commitOid": commit, "commitUrl": url})

    def answer(self, content: Any, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self.send(status, body, {"X-Error-Message": message} | codes | (headers or {}))

    def send_range(self, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        """The content, or the part in the Range header; if `cut`, only half is sent before the connection closes."""
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, start = 206, int(match[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send(status, content[start:], headers, cut)

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut


MODEL = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
ROUTES = {
    r"/api/repos/create": _Handler.create,
    r"/api/validate-yaml": _Handler.validate_yaml,
    MODEL: _Handler.model_info,
    MODEL + r"/revision/(?P<revision>[^/]+)": _Handler.model_info,
    MODEL + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?": _Handler.tree,
    MODEL + r"/preupload/(?P<revision>[^/]+)": _Handler.preupload,
    MODEL + r"/commit/(?P<revision>[^/]+)": _Handler.commit,
    r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)": _Handler.resolve,
    r"/files/(?P<repo_id>[^/]+/[^/]+)/(?P<commit>[^/]+)/(?P<path>.+)": _Handler.large_file,
}


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    """Git's hash of a file's content, which is the Hub's ETag for small files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
