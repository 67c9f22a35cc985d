"""`--push-to-hub` against a Hub of our own on the loopback: what is asked of it, and what is uploaded."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from anchor_cli.base.errors import InputError, RunError
from anchor_cli.export.push import check_push, push

TOKEN = "hf_secretOfTheTest"


class FakeHub(ThreadingHTTPServer):
    """The calls of huggingface_hub's create_repo, repo_info and create_commit, and what they carried."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Calls)
        self.asked: list[tuple[str, str, str | None]] = []
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.private = True
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Calls(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        return

    def _answer(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path, self.headers.get("Authorization")))
        if self.server.refuses:
            return self._answer({"error": "forbidden"}, 403)
        return self._answer({"id": "me/kure", "private": self.server.private, "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(("POST", self.path, self.headers.get("Authorization")))
        if self.server.refuses:
            self._answer({"error": "You don't have the rights to create a model under the namespace 'me'"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer({"url": f"{self.server.address}/me/kure", "id": "me/kure", "name": "me/kure"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer({"commitUrl": f"{self.server.address}/me/kure/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    import huggingface_hub.constants

    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("# kure\n")
    spec = {"model_name_or_path": "/home/me/Qwen3", "dataset_file_path": "/home/me/pairs", "learning_rate": 4e-5}
    (folder / "spec.json").write_text(json.dumps(spec))
    stage_two = {"model_name_or_path": str(folder), "output_dir": "/home/me/out", "temperature": 0.05}
    (folder / "stage_II.json").write_text(json.dumps(stage_two))
    return folder


def test_everything_is_uploaded_to_a_private_repository(hub: FakeHub, folder: Path) -> None:
    assert push(folder, "me/kure", private=True) == f"{hub.address}/me/kure"
    # huggingface_hub 1.x says "private", later ones a visibility
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private", hub.created
    assert set(hub.files) == {"1_Pooling/config.json", "README.md", "spec.json", "stage_II.json"}
    assert all(header == f"Bearer {TOKEN}" for _, path, header in hub.asked if "/api/models" in path or "repos" in path)
    assert any(method == "POST" and path.startswith("/api/models/me/kure/commit/main") for method, path, _ in hub.asked)


def test_neither_the_token_nor_local_paths_are_uploaded(hub: FakeHub, folder: Path) -> None:
    push(folder, "me/kure", private=True)
    everything = b"".join(hub.files.values())
    assert TOKEN.encode() not in everything and b"/home/me" not in everything
    assert json.loads(hub.files["stage_II.json"]) == {"model_name_or_path": "me/kure", "temperature": 0.05}
    assert json.loads(hub.files["spec.json"]) == {"model_name_or_path": "Qwen3", "learning_rate": 4e-5}
    assert json.loads((folder / "stage_II.json").read_text())["model_name_or_path"] == str(folder), "local file stays"


def test_an_existing_public_repository_is_refused_unless_asked_for(hub: FakeHub, folder: Path) -> None:
    hub.private = False
    with pytest.raises(InputError, match="exists and is public"):
        push(folder, "me/kure", private=True)
    assert not hub.files
    push(folder, "me/kure", private=False)
    assert "README.md" in hub.files


def test_a_refusal_is_one_line_without_the_token(hub: FakeHub, folder: Path) -> None:
    hub.refuses = True
    with pytest.raises(RunError) as caught:
        push(folder, "me/kure", private=True)
    assert "--push-to-hub me/kure" in caught.value.message and "403" in caught.value.message
    assert TOKEN not in str(caught.value) and "\n" not in caught.value.message
    assert "the export itself is whole" in (caught.value.hint or "")


def test_what_stops_a_push_is_said_before_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_push("me/kure")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_push("me/kure")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no token"):
        check_push("me/kure")
