"""Models on the Hugging Face hub: the real client library against a small server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from polyhead.errors import SourceError
from polyhead.sources import HubClient, Progress, resolve_model
from polyhead.sources.hub import HuggingFaceClient

FILES = {
    "README.md": b"read me",
    "tiny-Q4_K_M.gguf": b"GGUF q4km",
    "tiny-Q4_K_S.gguf": b"GGUF q4ks",
    "tiny.Q8_0.gguf": b"GGUF q8",
    "mmproj-model-Q8_0.gguf": b"GGUF images",
    "F16/tiny-F16-00001-of-00002.gguf": b"GGUF f16 one",
    "F16/tiny-F16-00002-of-00002.gguf": b"GGUF f16 two",
    "a/twin-Q2_K.gguf": b"GGUF a",
    "b/twin-Q2_K.gguf": b"GGUF b",
}


def commit() -> str:
    """The repository's newest revision; it changes with the files."""
    return hashlib.sha1(repr(FILES).encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for org/tiny; org/gated is gated, org/broken fails, all else does not exist."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        status, content, headers = 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if "org/gated" in path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif "org/broken" in path:
            status, headers = 418, {}
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in FILES]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in FILES.items()]
            info = {"id": "org/tiny", "sha": commit(), "siblings": siblings}
            status, content, headers = 200, json.dumps(tree if "/tree/" in path else info).encode(), {}
        elif path.startswith("/org/tiny/resolve/"):
            revision, _, name = path.removeprefix("/org/tiny/resolve/").partition("/")
            if revision not in ("main", commit()):
                headers = {"X-Error-Code": "RevisionNotFound"}
            elif name not in FILES:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit()}
            else:
                status, content = 200, FILES[name]
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit()}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content)), "Content-Type": "text/plain"}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubClient:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return HuggingFaceClient(tmp_path / "hub", endpoint)


def fetch(address: str, hub: HubClient, offline: bool = False) -> Path:
    return resolve_model(address, hub=hub, progress=False, offline=offline)


def test_a_file_is_fetched_once_and_then_found_offline(hub: HubClient, tmp_path: Path) -> None:
    address = "hf://org/tiny/tiny.Q8_0.gguf"
    found = fetch(address, hub)
    assert found.read_bytes() == b"GGUF q8"
    assert tmp_path / "hub" in found.parents
    unreachable = HuggingFaceClient(tmp_path / "hub", "http://127.0.0.1:9")
    assert fetch(address, unreachable, offline=True) == found
    assert fetch(f"hf://org/tiny@{commit()}/tiny.Q8_0.gguf", unreachable, offline=True) == found


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("Q4_K_M", "tiny-Q4_K_M.gguf"),
        ("q8_0", "tiny.Q8_0.gguf"),
        ("f16", "F16/tiny-F16-00001-of-00002.gguf"),
    ],
)
def test_a_file_is_found_by_its_quantisation(hub: HubClient, tag: str, name: str) -> None:
    found = fetch(f"hf://org/tiny:{tag}", hub)
    assert str(found).endswith(name)
    assert found.read_bytes() == FILES[name]


def test_all_parts_of_a_split_model_come_and_lie_side_by_side(hub: HubClient) -> None:
    found = fetch("hf://org/tiny/F16/tiny-F16-00002-of-00002.gguf", hub)
    assert found.name == "tiny-F16-00001-of-00002.gguf"
    assert found.with_name("tiny-F16-00002-of-00002.gguf").read_bytes() == b"GGUF f16 two"


def test_a_checksum_is_checked(hub: HubClient, tmp_path: Path) -> None:
    right = hashlib.sha256(b"GGUF q8").hexdigest()
    address = "hf://org/tiny:Q8_0"
    assert resolve_model(address, sha256=right, hub=hub, progress=False, cache=tmp_path).exists()
    with pytest.raises(SourceError, match=rf"SHA-256 is {right}, but 0+ was expected; .*delete"):
        resolve_model(address, sha256="0" * 64, hub=hub, progress=False, cache=tmp_path)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://org/tiny:K_M", r"K_M fits no file; there are F16/.*tiny-Q4_K_M\.gguf"),
        ("hf://org/tiny:Q2_K", r"fits several files, name one: a/twin-Q2_K\.gguf, b/twin-Q2_K\.gguf"),
        ("hf://org/tiny/none.gguf", r"has no file 'none\.gguf'; there are .*tiny\.Q8_0\.gguf"),
        ("hf://org/tiny@v9/tiny.Q8_0.gguf", "has no revision 'v9'"),
        ("hf://org/none/x.gguf", "no such repository, or a private one"),
        ("hf://org/none:Q8_0", "no such repository, or a private one"),
        ("hf://org/gated/x.gguf", "is gated; accept its terms .* HF_TOKEN"),
        ("hf://org/broken:Q8_0", "HTTP 418"),
    ],
)
def test_each_refusal_of_the_hub_is_told_in_its_own_words(hub: HubClient, address: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        fetch(address, hub)


class NoNetwork:
    """Answers as the client library does where there is no network, without its half a minute of attempts."""

    def list_files(self, repo: str, revision: str | None) -> list[str]:
        raise ConnectionError("no route to host")

    def download(self, repo: str, file: str, revision: str | None, *, offline: bool, progress: Progress) -> Path:
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("cannot find the file and outgoing traffic failed")


def test_offline_and_unreachable_are_told_apart(hub: HubClient) -> None:
    with pytest.raises(SourceError, match="not in the local cache, and offline is set"):
        fetch("hf://org/tiny/tiny.Q8_0.gguf", hub, offline=True)
    with pytest.raises(SourceError, match=r"offline, the hub cannot be asked .* name the file"):
        fetch("hf://org/tiny:Q8_0", hub, offline=True)
    with pytest.raises(SourceError, match=r"hub cannot be reached and the file is not in the local cache"):
        fetch("hf://org/tiny/tiny.Q8_0.gguf", NoNetwork())


def test_a_newer_version_is_fetched_only_when_the_checksum_asks_for_it(hub: HubClient, tmp_path: Path) -> None:
    address, name = "hf://org/tiny/tiny.Q8_0.gguf", "tiny.Q8_0.gguf"
    old, new = FILES[name], b"GGUF q8, second edition"
    try:
        assert fetch(address, hub).read_bytes() == old
        FILES[name] = new
        assert fetch(address, hub).read_bytes() == old
        wanted = hashlib.sha256(new).hexdigest()
        assert resolve_model(address, sha256=wanted, hub=hub, progress=False, cache=tmp_path).read_bytes() == new
    finally:
        FILES[name] = old


def test_without_the_client_library_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"pip install 'polyhead\[hub\]'"):
        resolve_model("hf://org/tiny:Q8_0", progress=False)
