"""Images by digest, from an engine that answers as Docker's does: deployments.pin_images."""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

import pytest

from deployments import pin_images

OF_REGISTRY = {name: f"sha256:{digit * 64}" for name, digit in (("postgres:17", "a"), ("python:3.13-slim-trixie", "b"))}
OF_ENGINE = {"redis:8": f"sha256:{'c' * 64}"}


class Answering(BaseHTTPRequestHandler):
    """`GET /distribution/NAME/json` asks the registry, `GET /images/NAME/json` the engine."""

    def do_GET(self) -> None:
        path = unquote(self.path).removeprefix("/v1.44")
        kind, _, name = path.strip("/").removesuffix("/json").partition("/")
        match kind:
            case "version":
                self._answer(200, {"ApiVersion": "1.44", "MinAPIVersion": "1.24", "Version": "27"})
            case "distribution" if name in OF_REGISTRY:
                self._answer(200, {"Descriptor": {"digest": OF_REGISTRY[name]}, "Platforms": []})
            case "distribution":
                self._answer(403, {"message": "error parsing HTTP 403 response body: access denied"})
            case "images" if name in OF_ENGINE:
                self._answer(200, {"Id": "sha256:1", "RepoDigests": [f"redis@{OF_ENGINE[name]}"]})
            case _:
                self._answer(404, {"message": f"No such image: {name}"})

    def _answer(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return "engine"

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "s"
    with socketserver.ThreadingUnixStreamServer(str(path), Answering) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"unix://{path}"
        server.shutdown()
        thread.join()


def test_every_image_is_pinned_that_the_registry_or_the_engine_knows(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "compose.env"
    example = (pin_images.HERE / "compose.env.example").read_text().replace("PREFECT_PASSWORD=", "PREFECT_PASSWORD=s3")
    file.write_text(example)
    file.chmod(0o600)
    for write, again in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(sys, "argv", ["", str(file), "--host", engine, *["--write"] * write])
        assert pin_images.main() == 1, "the flows' own image is in no registry"
        printed = capsys.readouterr().out
        assert "OPS_IMAGE: not pinned, the registry refuses interview-ops:latest" in printed
        assert "s3" not in printed
        assert printed.count("(pinned)") == (3 if again else 0)
        assert (file.read_text() == example) is not write
    lines = file.read_text().splitlines()
    assert f"POSTGRES_IMAGE=postgres:17@{OF_REGISTRY['postgres:17']}" in lines
    assert f"REDIS_IMAGE=redis:8@{OF_ENGINE['redis:8']}" in lines
    assert f"BASE_IMAGE=python:3.13-slim-trixie@{OF_REGISTRY['python:3.13-slim-trixie']}" in lines
    assert "OPS_IMAGE=interview-ops:latest" in lines, "what is not known stays"
    assert len(lines) == len(example.splitlines()), "each in the place of its own line"
    assert file.stat().st_mode & 0o777 == 0o600
    # A pinned image follows its tag when it is resolved again.
    monkeypatch.setitem(OF_REGISTRY, "postgres:17", f"sha256:{'d' * 64}")
    pin_images.main()
    assert f"POSTGRES_IMAGE=postgres:17@sha256:{'d' * 64}" in file.read_text().splitlines()


def test_every_image_of_the_compose_file_has_its_variable() -> None:
    text = (pin_images.HERE / "compose.yaml").read_text()
    assert text.count("image: ") == len(pin_images.images_of({})) - 1
    assert all(name in (pin_images.HERE / "compose.env.example").read_text() for name in pin_images.images_of({}))
