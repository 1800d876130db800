"""An engine that is away, hangs, refuses, or is none: each flow says so in one sentence. With a real one: tests/system."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect_docker.credentials import DockerRegistryCredentials
from pydantic import SecretStr

from blocks import docker as block
from flows.infrastructure.images.building import build_images
from flows.infrastructure.images.cleaning import clean_docker
from flows.infrastructure.images.deployment import deploy_application
from flows.infrastructure.images.usage import check_docker_usage
from runbook import kinds
from runbook.errors import OpsError, RunbookFailed

NAME = "trial"
TOML = """
name = "trial"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[docker]
host = "{host}"
[docker.containers.backend]
image = "grc-backend"
"""
FLOWS: tuple[Callable[[], object], ...] = (
    lambda: check_docker_usage.fn(NAME),
    lambda: clean_docker.fn(NAME, confirm=NAME),
    lambda: deploy_application.fn(NAME, "v1", confirm=NAME),
)
EACH = pytest.mark.parametrize("run", FLOWS, ids=["usage", "clean", "deploy"])


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [])
    return lambda host: (tmp_path / "trial.toml").write_text(TOML.format(base=tmp_path, host=host)) and None


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        yield listening


@EACH
def test_one_that_is_away(run: Callable[[], object], described: Callable[[str], None], tmp_path: Path) -> None:
    described(f"unix://{tmp_path}/nothing")
    with pytest.raises(RunbookFailed, match="does not answer. Next: start it .systemctl start docker"):
        run()


def test_one_that_refuses_or_hangs(
    described: Callable[[str], None], listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described(f"unix://{tmp_path}/s")
    monkeypatch.setattr(block, "CALL_SECONDS", 1)
    with pytest.raises(RunbookFailed, match="does not answer within 1 s. Next: check it"):
        check_docker_usage.fn(NAME)
    listener.close()
    with pytest.raises(RunbookFailed, match="does not answer. Next: start it"):
        check_docker_usage.fn(NAME)


def test_what_is_no_engine(described: Callable[[str], None], listener: socket.socket, tmp_path: Path) -> None:
    described(f"unix://{tmp_path}/s")

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with pytest.raises(RunbookFailed, match="is no Docker: .* Next: correct host"):
        check_docker_usage.fn(NAME)
    thread.join(60)


def test_bad_input_is_one_sentence(described: Callable[[str], None], tmp_path: Path) -> None:
    described(f"unix://{tmp_path}/nothing")
    for run, said in (
        (lambda: clean_docker.fn(NAME, parts=(), confirm=NAME), "nothing is chosen"),
        (lambda: deploy_application.fn(NAME, "no version"), "is no version"),
        (lambda: deploy_application.fn(NAME, "v1", roles=("nobody",)), "names no container nobody"),
        (lambda: build_images.fn(NAME, "a/b"), "is no version"),
        (lambda: deploy_application.fn(NAME), "no version is given"),
        (lambda: build_images.fn(NAME, "v1"), "no container has a dockerfile"),
        (lambda: build_images.fn(NAME, "v1", roles=("backend",)), "names no checkout to build from"),
    ):
        with pytest.raises(RunbookFailed, match=said):
            run()


def test_the_login_is_a_block_of_prefect_docker_and_goes_to_its_registry_only() -> None:
    docker = block.Docker(registry="registry.test:5000/team", username="ci", password=SecretStr("pass-4711"))
    credentials = docker.credentials()
    assert isinstance(credentials, DockerRegistryCredentials)
    assert credentials.registry_url == "registry.test:5000"
    assert docker.login("registry.test:5000/team/backend:v1") == {"username": "ci", "password": "pass-4711"}
    assert docker.login("registry.test/team/backend:v1") is None
    assert docker.login("python:3.12") is None
    assert block.Docker(registry="registry.test").credentials() is None
    assert "pass-4711" not in repr(credentials) + repr(docker)


def test_a_size_that_is_none_is_told_by_its_key(described: Callable[[str], None], tmp_path: Path) -> None:
    described("")
    path = tmp_path / "trial.toml"
    path.write_text(path.read_text() + 'memory = "much"\n')
    with pytest.raises(OpsError, match=r"containers.backend.memory is wrong: found “much” — expected: .*512m"):
        check_docker_usage.fn(NAME)
    path.write_text(path.read_text().replace("memory", "memry"))
    with pytest.raises(OpsError, match=r"containers.backend.memry is wrong"):
        check_docker_usage.fn(NAME)
