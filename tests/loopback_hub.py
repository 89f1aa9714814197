"""A Hub on this machine: enough of huggingface.co's HTTP API for `huggingface_hub` itself, via HF_ENDPOINT.

`LoopbackHub` is a context manager; before it is entered, its port refuses connections. It serves downloads (HEAD and
GET with ETag and ranges), creates repositories, takes commits of regular files, and validates the metadata of a card.
`cuts` breaks downloads off in the middle.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
USER = "tester"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: "LoopbackHub"

    def log_message(self, *args) -> None:
        pass

    def _reply(self, status: int, body: Any = b"", error: str = "", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def _read(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.requests.append(f"{self.command} {self.path}")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in self.hub.repos:
                return self._reply(401 if not self._token else 404, error="RepoNotFound")
            files = [{"rfilename": name} for name in self.hub.repos[repo]]
            return self._reply(200, {"id": repo, "sha": self.hub.revision(repo), "siblings": files, "tags": []})
        if len(parts) < 5 or parts[2] != "resolve":
            return self._reply(404)
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        if repo not in self.hub.repos:
            return self._reply(401 if not self._token else 404, error="RepoNotFound")
        commit = {"X_Repo_Commit": self.hub.revision(repo)}
        if name not in self.hub.repos[repo]:
            return self._reply(404, error="EntryNotFound", **commit)
        return self._file(self.hub.repos[repo][name], **commit)

    def _file(self, content: bytes, **headers: str) -> None:
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self._reply(200, content, **headers)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if not self.hub.cuts or len(content) < 100_000:
            return self._reply(206 if start else 200, content[start:], **headers)
        # promises all of it, sends a part, and hangs up
        self.hub.cuts -= 1
        self.send_response(206 if start else 200)
        for name, value in {"Content-Length": str(len(content) - start), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[start : (start + len(content)) // 2])
        self.wfile.flush()
        self.close_connection = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.requests.append(f"POST {self.path}")
        if parts == ["api", "validate-yaml"]:
            errors = self.hub.card_errors(json.loads(body)["content"])
            return self._reply(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})
        if not self._token:
            return self._reply(401, {"error": "Invalid username or password."})
        if self._token not in (WRITER, READER):
            return self._reply(401, {"error": "Invalid user token."})
        if self._token == READER:
            return self._reply(403, {"error": "You don't have the rights to write under this namespace."})
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            owner = wanted["organization"] or USER
            repo = f"{owner}/{wanted['name']}"
            if owner != USER:
                return self._reply(403, {"error": f"You don't have the rights to create a model under {owner}."})
            url = f"{self.hub.url}/{repo}"
            if repo in self.hub.repos:
                return self._reply(409, {"error": "You already created this model repo", "url": url})
            self.hub.repos[repo] = {}
            return self._reply(200, {"url": url, "name": repo})
        repo, action = "/".join(parts[2:4]), parts[4]
        if repo not in self.hub.repos:
            return self._reply(404, error="RepoNotFound")
        if action == "preupload":
            same = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **same} for file in json.loads(body)["files"]]
            return self._reply(200, {"files": files})
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = self.hub.revision(repo)
            return self._reply(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})
        return self._reply(404)


class LoopbackHub:
    """The server, on a port of its own, with a folder for the clients' caches.

    Attributes:
        repos: Repository → file name → content.
        requests: What was asked, in order.
        cuts: How many downloads of a file above 100 kB still break off in the middle.
    """

    def __init__(self, home: Path):
        self.home = home
        self.repos: Dict[str, Dict[str, bytes]] = {}
        self.requests: List[str] = []
        self.cuts = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
        self.server.daemon_threads = True
        self.server.server_bind()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        self.server.server_activate()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def revision(self, repo: str) -> str:
        """Of the repository's content, as a commit's name."""
        content = b"".join(name.encode() + data for name, data in sorted(self.repos[repo].items()))
        return hashlib.sha1(content).hexdigest()

    def add(self, repo: str, folder: Path) -> None:
        """Makes a repository of a folder's files."""
        self.repos[repo] = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    @staticmethod
    def card_errors(card: str) -> List[str]:
        """What the Hub would refuse in a card's metadata (a part of its rules)."""
        if not card.startswith("---\n") or "\n---\n" not in card[4:]:
            return ["there is no metadata"]
        data = yaml.safe_load(card[4:].split("\n---\n")[0])
        errors = [f'"{key}" is required' for key in ("license", "library_name", "tags") if not data.get(key)]
        errors += [f'"{tag}" is no string' for tag in data.get("tags", []) if not isinstance(tag, str)]
        for model in data.get("model-index", []):
            for result in model.get("results", []):
                if not {"task", "dataset", "metrics"} <= set(result) or not {"type", "name"} <= set(result["dataset"]):
                    errors.append('"model-index" lacks a task, a data set with type and name, or metrics')
        return errors

    def environment(self, **changes: str) -> Dict[str, str]:
        """Of a process that knows this Hub only, with a cache of its own."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        return {**env, **changes}

    def python(self, code: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        """Runs `code` (or, if it ends in .py, that script) in a process that knows this Hub only."""
        command = [code] if code.endswith(".py") else ["-c", code]
        return subprocess.run(
            [sys.executable, *command, *arguments],
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            timeout=300,
        )
