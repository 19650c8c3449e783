"""Uploads, to a stand-in for the Hugging Face Hub."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.release import hub


class StandIn(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files asks for; `server.seen` collects it."""

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.server.refuses:
            self.answer({"error": "You don't have the rights"}, status=403)
        else:
            self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body.decode()))
        if self.server.refuses:
            self.answer({"error": "You don't have the rights"}, status=403)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.server.url}/me/model", "id": "me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"{self.server.url}/me/model/commit/1", "commitOid": "1", "pullRequestUrl": None})
        else:
            self.answer({})

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.seen, server.refuses, server.url = [], False, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_upload_has_model_exports_and_card_and_no_run_json(stand_in: Any, tmp_path: Path) -> None:
    model, gguf = tmp_path / "merged", tmp_path / "gguf"
    for folder, names in ((model, ("config.json", "model.safetensors", "run.json", "README.md")), (gguf, ("m.gguf",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(f"{folder.name} {name}")
    url = hub.push("me/model", model, card="# card", exports={"gguf": gguf}, private=True, endpoint=stand_in.url)
    assert url == f"{stand_in.url}/me/model/commit/1"
    created = next(body for path, _, body in stand_in.seen if path.endswith("/repos/create"))
    assert json.loads(created)["visibility"] == "private"
    committed = next(body for path, _, body in stand_in.seen if "/commit/" in path)
    lines = [json.loads(line)["value"] for line in committed.splitlines()]
    paths = {line["path"] for line in lines if "path" in line}
    assert paths == {"README.md", "config.json", "model.safetensors", "gguf/m.gguf"}
    assert {token for _, token, _ in stand_in.seen} == {"Bearer hf_secret"}
    stand_in.refuses = True
    with pytest.raises(PokegemmaError, match=r"^--push_to_hub me/model: .*403"):
        hub.push("me/model", model, card="# card", exports={}, private=True, endpoint=stand_in.url)
    with pytest.raises(PokegemmaError, match=r"^--push_to_hub me/model: "):  # nobody listens there
        hub.push("me/model", model, card="# card", exports={}, private=True, endpoint="http://127.0.0.1:9")


def test_an_upload_that_cannot_succeed_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PokegemmaError, match=r"^--push_to_hub: no token"):
        hub.check_hub("me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.check_hub("me/model")
    with pytest.raises(PokegemmaError, match=r"^--push_to_hub model: "):
        hub.check_hub("model")
    with pytest.raises(PokegemmaError, match="--push_to_hub me//model"):
        hub.check_hub("me//model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PokegemmaError, match="HF_HUB_OFFLINE is set"):
        hub.check_hub("me/model")
