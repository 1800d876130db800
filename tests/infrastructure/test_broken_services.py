"""Services that hang, break off or answer something else than they should: the cloud account, and Docker over TCP."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from blocks import cloud
from blocks import docker as block
from flows.infrastructure.images.bases import check_base_images
from flows.infrastructure.images.cleaning import clean_docker
from flows.infrastructure.images.deployment import deploy_application
from flows.infrastructure.images.resources import review_resources
from flows.infrastructure.images.usage import check_docker_usage
from runbook import kinds
from runbook.report import Report, Status
from tests.fixtures.application.broken import SECRET, reported
from tests.infrastructure.test_resources import CLOUD, TOML

Mode = Literal["hangs", "closes", "garbage", "half", "other", "list", "broken"]
MODES: tuple[Mode, ...] = ("hangs", "closes", "garbage", "half", "other", "list", "broken")
BODIES = {
    "garbage": b"hello",
    "half": b'{"Containers": [{"Id',
    "other": b'{"a": 1}',
    "list": b"[1]",
    "broken": f"see https://worker:{SECRET}@registry.test/".encode(),
}
DOCKER = """
[docker]
host = "{host}"
checkout = "{base}/checkout"
[docker.containers.backend]
image = "grc-backend"
dockerfile = "Dockerfile"
"""


@contextmanager
def answering(mode: Mode, version: bytes = b"") -> Iterator[int]:
    """A server that answers every request so, but for `version` to those for the engine's version."""
    ends = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            while request := connection.recv(1 << 16):
                if b"GET /version" in request and version:
                    body, status = version, b"200 OK"
                elif mode == "hangs":
                    ends.wait()
                    return
                elif mode == "closes":
                    return
                else:
                    body, status = BODIES[mode], b"500 Oh" if mode == "broken" else b"200 OK"
                head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                connection.sendall(head % (status, len(body)) + body)

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        try:
            yield listening.getsockname()[1]
        finally:
            ends.set()
            listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setenv("OPS_ENVIRONMENT", "trial")
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    monkeypatch.setenv("TRIAL_SECRET", "testing")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [])
    monkeypatch.setattr(cloud, "READ_SECONDS", 1)
    monkeypatch.setattr(cloud, "ATTEMPTS", 1)
    monkeypatch.setattr(block, "CALL_SECONDS", 2)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "Dockerfile").write_text("FROM debian:13\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for argv in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "The application"]):
        subprocess.run([*git, *argv], check=True)
    return lambda more: (tmp_path / "trial.toml").write_text(TOML.format(base=tmp_path) + more) and None


def text(report: Report) -> str:
    """All of it."""
    assert report.path
    said = report.path.read_text() + report.path.with_suffix(".md").read_text()
    assert SECRET not in said
    assert "Traceback" not in said
    assert "the run ended early" not in said
    return said


@pytest.mark.parametrize("mode", MODES)
def test_a_cloud_account_that_gives_no_answer_is_told_part_by_part(
    mode: Mode, described: Callable[[str], None]
) -> None:
    with answering(mode) as port:
        described(CLOUD.format(endpoint=f"http://127.0.0.1:{port}"))
        report = reported(lambda: review_resources.fn("trial"))
    text(report)
    bad = [one for one in report.findings if one.status is not Status.OK]
    assert len(bad) >= 4
    assert all(one.hint for one in bad)
    assert report.status is Status.WARN


DOCKERS: dict[str, Callable[[], Report]] = {
    "usage": lambda: check_docker_usage.fn("trial"),
    "clean": lambda: clean_docker.fn("trial", confirm="trial"),
    "deploy": lambda: deploy_application.fn("trial", "v1", confirm="trial"),
    "bases": lambda: check_base_images.fn("trial"),
    "review": lambda: review_resources.fn("trial"),
}


VERSION = b'{"ApiVersion": "1.44"}'
CASES = [(flow, mode, VERSION) for flow in DOCKERS for mode in ("half", "other", "list")]
CASES += [("usage", mode, version) for mode in MODES for version in (b"", VERSION)]


@pytest.mark.parametrize(("flow", "mode", "version"), dict.fromkeys(CASES))
def test_an_engine_that_gives_no_answer_is_told(
    flow: str,
    mode: Mode,
    version: bytes,
    described: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.docker.inventory.COUNT_SECONDS", 2)
    with answering(mode, version) as port:
        described(DOCKER.format(host=f"tcp://127.0.0.1:{port}", base=tmp_path))
        report = reported(DOCKERS[flow])
    assert "Docker" in text(report)
    bad = [one for one in report.findings if one.status is not Status.OK]
    assert any("Docker" in f"{one.name} {one.value}" and one.hint for one in bad), bad
    assert report.status in (Status.WARN, Status.CRITICAL)
