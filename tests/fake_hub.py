"""A Hugging Face hub with one model that runs on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

from sophia_galore.model import reach

MODEL = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class FakeHub(ThreadingHTTPServer):
    """Answers the requests of `huggingface_hub`; misbehaves as told."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.listing: Any = listing(files)  # what the hub says of the model
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.refuse: tuple[int, dict[str, str]] | None = None  # answer to every question about the model
        self.refuse_files = 0  # status for every file
        self.cut_at: int | None = None  # close the connection after so many bytes of the weights, once
        self.after_cut = 200  # status for the weights from then on
        self.stall = threading.Event()  # set: keep silent on the weights
        self.release = threading.Event()
        self.damage = False
        self.knows_ranges = True
        self.made: dict[str, Any] | None = None  # the repository that was asked for
        self.cards: list[str] = []  # model cards that were to be checked
        self.stored: dict[str, bytes] = {}  # large files that were uploaded, by SHA-256
        self.pushed: dict[str, bytes] = {}  # files that were committed
        self.sent: list[tuple[str, int]] = []  # file, bytes of it that were sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self, name: str) -> list[str | None]:
        return [asked for _, path, asked in self.log if path.endswith("/" + name)]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub_ = self.server
        path = self.path.split("?")[0]
        hub_.log.append((self.command, path, self.headers.get("Range")))
        if path == "/":
            return self.reply(200, b"hello")
        if hub_.refuse is not None:
            return self.reply(hub_.refuse[0], b"{}", hub_.refuse[1])
        if path == f"/api/models/{MODEL}":
            return self.reply(200, json.dumps(hub_.listing).encode())
        match = re.fullmatch(f"/{MODEL}/resolve/{COMMIT}/(.+)", path)
        if match is None or match[1] not in hub_.files:
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if hub_.refuse_files:
            return self.reply(hub_.refuse_files, b"{}")
        self.send_file(match[1])

    def do_POST(self) -> None:
        hub_ = self.server
        path = self.path.split("?")[0]
        hub_.log.append((self.command, path, None))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub_.refuse is not None:
            return self.reply(hub_.refuse[0], b"{}", hub_.refuse[1])
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":  # of a README.md
            hub_.cards.append(json.loads(body)["content"])
            return self.reply_json({"errors": [], "warnings": []})
        if path == f"/api/models/{MODEL}/preupload/main":
            return self.tell_ways(json.loads(body))
        if path == f"/{MODEL}.git/info/lfs/objects/batch":
            return self.tell_places(json.loads(body))
        if path == f"/api/models/{MODEL}/commit/main":
            return self.commit([json.loads(line) for line in body.splitlines()])
        self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.stored[hashlib.sha256(content).hexdigest()] = content
        self.reply(200, b"")

    def create(self, asked: dict[str, Any]) -> None:
        hub_ = self.server
        status, hub_.made = (200, asked) if hub_.made is None else (409, hub_.made)
        hub_.listing = {**hub_.listing, "private": hub_.made.get("visibility") == "private"}
        page = {"url": f"{hub_.url}/{asked['organization']}/{asked['name']}"}
        self.reply(status, json.dumps(page).encode(), {"Content-Type": "application/json"})

    def tell_ways(self, asked: dict[str, Any]) -> None:
        """Large files go to a store, all others into the commit; which are large is the hub's affair."""
        ways = []
        for file in asked["files"]:
            large = file["path"].endswith((".safetensors", ".gguf"))
            ways.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        self.reply_json({"files": ways})

    def tell_places(self, asked: dict[str, Any]) -> None:
        place = {"upload": {"href": f"{self.server.url}/store"}}
        objects = [{"oid": wanted["oid"], "size": wanted["size"], "actions": place} for wanted in asked["objects"]]
        self.reply_json({"transfer": "basic", "objects": objects})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        hub_ = self.server
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub_.pushed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub_.pushed[value["path"]] = hub_.stored[value["oid"]]
        self.reply_json({"commitUrl": f"{hub_.url}/{MODEL}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def reply_json(self, answer: dict[str, Any]) -> None:
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str) -> None:
        hub_ = self.server
        content = hub_.files[name]
        if hub_.damage and name == WEIGHTS:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = self.headers.get("Range") if hub_.knows_ranges else None
        first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(content)
        if name == WEIGHTS and hub_.stall.is_set():
            hub_.release.wait(20)
            self.close_connection = True
            return
        if name == WEIGHTS and hub_.cut_at is not None:
            cut_at, hub_.cut_at = hub_.cut_at, None
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:cut_at])
            self.close_connection = True
            if hub_.after_cut != 200:
                hub_.refuse_files = hub_.after_cut
            return
        part = content[start:stop]
        hub_.sent.append((name, len(part)))
        whole = len(part) == len(content)
        headers = {} if whole else {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}
        self.reply(200 if whole else 206, part, headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def listing(files: dict[str, bytes]) -> dict[str, Any]:
    """What the hub tells of the model: weights are large files, all others are git's."""
    siblings = []
    for name, content in files.items():
        entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if name.endswith(".safetensors"):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        siblings.append(entry)
    return {"id": MODEL, "sha": COMMIT, "siblings": siblings}


@contextmanager
def serving(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with these files that `huggingface_hub` takes for the real one."""
    server = FakeHub(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    # Both are what HF_ENDPOINT sets when the library is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@contextmanager
def taking_uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub that may be written to."""
    # The library's other way of uploading talks to a server of its own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_for_tests")
    with serving({}, monkeypatch) as hub:
        yield hub


@contextmanager
def fresh_probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No hub was asked yet whether it is there, and ModelScope is not."""
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")  # the discard port: refused at once
    reach.probe_hugging_face.cache_clear()
    reach.probe_modelscope.cache_clear()
    yield
    reach.probe_hugging_face.cache_clear()
    reach.probe_modelscope.cache_clear()
