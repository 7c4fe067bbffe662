"""Model folders, and repositories of a hub that runs here: the client is the real one."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.core.hub import load_pretrained, resolve_folder, save_pretrained
from support.cli import run_python
from support.configs import Fuzzed, Inner

FILES = {
    "config.json": b'{"steps": 3}',
    "model.safetensors": b"not read here",
    "pytorch_model.bin": b"a pickle, never to be fetched",
    "README.md": b"a card",
}
REVISION = "a" * 40
UPLOADED: list[tuple[str, list[dict[str, Any]]]] = []


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    config = Fuzzed(steps=3, inner=Inner(depth=9))
    tensors = {"w": torch.randn(4, 4), "b": torch.randn(4)}
    folder = save_pretrained(tmp_path / "new", config, tensors, card="# A model\n")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    again, read = load_pretrained(folder, Fuzzed)
    assert again == config
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    save_pretrained(folder, config, tensors, int8_rows=["w"])
    assert (folder / "README.md").read_text() == "# A model\n", "left alone where none is given"
    step = tensors["w"].abs().amax(1, keepdim=True) / 250
    assert ((load_pretrained(folder, Fuzzed)[1]["w"] - tensors["w"]).abs() < step).all()


def test_faults_of_a_folder_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json: no such file"):
        load_pretrained(tmp_path, Fuzzed)
    (tmp_path / "config.json").write_text('{"steppps": 3}')
    with pytest.raises(ConfigError, match=r"config\.json: steppps: unknown field"):
        load_pretrained(tmp_path, Fuzzed)
    with pytest.raises(WeightsError, match="is a file; give the folder that holds it"):
        resolve_folder(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["none", "./none/model", "a/b/c", "~/none", "", "a/../b", "-x/y"])
def test_what_cannot_be_a_repository_is_no_such_folder(name: str) -> None:
    with pytest.raises(WeightsError, match=r"no such folder$"):
        resolve_folder(name or "none")


def test_a_path_is_never_taken_for_a_repository() -> None:
    with pytest.raises(WeightsError, match=r"^owner/name: no such folder$"):
        resolve_folder(Path("owner/name"))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_POST(self) -> None:
        """Take a new repository, say that files go in as they are, and take a commit of them."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines()]
        if self.path == "/api/repos/create":
            reply = {"url": f"http://{self.headers['Host']}/me/new"}
        elif self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in lines[0]["files"]]
            reply = {"files": [{**file, "shouldIgnore": False} for file in files]}
        elif self.path.endswith("/commit/main"):
            reply = {
                "commitUrl": f"http://{self.headers['Host']}/me/new/commit/1",
                "commitOid": REVISION,
            }
        else:
            reply = {}
        UPLOADED.append((self.path, lines))
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        file = path.rpartition("/")[2]
        if path.startswith("/api/models/me/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                for name, data in FILES.items()
            ]
            data = json.dumps(tree).encode()
        elif path.startswith("/api/models/me/model"):
            siblings = [{"rfilename": name} for name in FILES]
            data = json.dumps({"id": "me/model", "sha": REVISION, "siblings": siblings}).encode()
        elif path.startswith("/me/model/resolve/") and file in FILES:
            data = FILES[file]
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


RESOLVE = """
import sys
from polyzoo.core.errors import WeightsError
from polyzoo.core.hub import resolve_folder
name, offline, *files = sys.argv[1:]
if offline == "blocked":
    import socket
    def refuse(*arguments, **options):
        raise OSError("sockets are blocked")
    socket.socket.connect = refuse
try:
    folder = resolve_folder(name, local_files_only=offline == "local", files=files)
    print(*sorted(path.name for path in folder.iterdir()))
except WeightsError as error:
    print("WeightsError:", error)
"""


def test_repositories_are_fetched_once_without_pickles(endpoint: str, tmp_path: Path) -> None:
    def resolve(name: str, mode: str = "online", *files: str) -> str:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        done = run_python(RESOLVE, name, mode, *files, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    fetched = "README.md config.json model.safetensors"
    assert "and local_files_only is set; give a local folder" in resolve("me/model", "local")
    assert "the hub cannot be reached; give a local folder" in resolve("me/model", "blocked")
    assert resolve("me/model", "online", "config.json") == fetched
    assert resolve("me/model", "local") == fetched
    assert resolve("me/model", "blocked") == fetched
    assert "pytorch_model.bin: no such file" in resolve("me/model", "local", "pytorch_model.bin")
    answer = resolve("me/none")
    assert answer.startswith("WeightsError: me/none: no such folder, and the hub shows no such rep")


PUSH = """
import sys
from polyzoo.core.errors import PolyzooError
from polyzoo.core.hub import push_to_hub
try:
    print(push_to_hub(sys.argv[1], "me/new", token="hf_x", private=True))
except PolyzooError as error:
    print("PolyzooError:", error)
"""


def test_a_folder_is_uploaded_without_pickles(endpoint: str, tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "m", Fuzzed(), {"w": torch.ones(2)}, card="# A\n")
    (folder / "training.pt").write_bytes(b"a pickle")
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
    UPLOADED.clear()
    done = run_python(PUSH, str(folder), env=environment)
    assert done.stdout == f"{endpoint}/me/new/commit/1\n", done.stderr
    paths = dict(UPLOADED)
    (create,) = paths["/api/repos/create"]
    assert create.get("private") or create.get("visibility") == "private"
    (commit,) = (lines for path, lines in UPLOADED if path.endswith("/commit/main"))
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in commit
        if line["key"] == "file"
    }
    assert sent.keys() == {"README.md", "config.json", "model.safetensors"}
    assert all((folder / name).read_bytes() == data for name, data in sent.items())


def test_a_failed_upload_is_one_line(tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "m", Fuzzed(), {"w": torch.ones(2)})
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = run_python(PUSH, str(folder), env=environment)
    assert done.stdout.startswith("PolyzooError: me/new: could not be uploaded: "), done.stderr
    assert done.stdout.count("\n") == 1


def test_local_folders_need_no_network(tmp_path: Path) -> None:
    save_pretrained(tmp_path, Fuzzed(), {"w": torch.ones(2)})
    done = run_python(RESOLVE, str(tmp_path), "blocked", "config.json")
    assert done.stdout == "config.json model.safetensors\n", done.stderr
