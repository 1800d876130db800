"""A Docker Engine and a registry of a test run's own, from Debian's docker.io, docker-registry and busybox-static."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest

from runbook.wait import until
from tests.servers import free_port

BUSYBOX = Path("/bin/busybox")
BASE = "busy:1"
PATIENCE_SECONDS = 90
NAME = "dock"
TOML = """
name = "{name}"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
kind = "docker"
host = "{host}"
stop_seconds = 1
names = {{ backend = "{prefix}-backend", frontend = "{prefix}-frontend" }}
[docker]
host = "{host}"
"""
REGISTRY = """
version: 0.1
storage:
  filesystem:
    rootdirectory: {directory}
http:
  addr: 127.0.0.1:{port}
"""


@dataclass
class Engine:
    """A running engine: its address, a client of it, and a prefix that is a test's own."""

    host: str
    client: Any
    prefix: str = ""

    def image(
        self, name: str, *steps: str, tags: tuple[str, ...] = ("1",), files: dict[str, bytes] | None = None
    ) -> str:
        """Build `FROM busy:1` and the steps; returns the first reference."""
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w") as archive:
            dockerfile = "\n".join([f"FROM {BASE}", *steps]).encode()
            for path, content in {"Dockerfile": dockerfile, **(files or {})}.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        context.seek(0)
        built, _ = self.client.images.build(fileobj=context, custom_context=True, rm=True)
        for tag in tags:
            built.tag(f"{self.prefix}-{name}", tag)
        return f"{self.prefix}-{name}:{tags[0]}"

    def run(self, name: str, *command: str, image: str = BASE, **options: Any) -> Any:
        """A running container of the test's own; it sleeps where it is not told otherwise, and dies at once."""
        options = {"network_mode": "none", "init": False, **options}
        container = self.client.containers.run(
            image, list(command) or ["sleep", "1000"], name=f"{self.prefix}-{name}", detach=True, **options
        )
        container.reload()
        return container


@contextlib.contextmanager
def _ended(argv: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output) as child:
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()


def _unmount(directory: Path) -> None:
    """What an engine that was killed left mounted."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((one for one in mounts if one.startswith(f"{directory}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)


@contextlib.contextmanager
def running_engine() -> Iterator[str]:
    """The address of an engine without networks of its own, empty; its containers end with the block."""
    directory = Path(tempfile.mkdtemp(prefix="ops-docker-"))
    host = f"unix://{directory}/docker.sock"
    argv = ["dockerd", "--bridge=none", "--iptables=false", "--ip6tables=false", f"--host={host}",
            f"--data-root={directory}/data", f"--exec-root={directory}/exec", f"--pidfile={directory}/pid"]  # fmt: skip
    log = directory / "log"
    try:
        with _ended(argv, log) as child:

            def ready() -> bool:
                assert child.poll() is None, f"dockerd ended:\n{log.read_text()[-3000:]}"
                with (
                    contextlib.suppress(docker.errors.DockerException),
                    contextlib.closing(docker.DockerClient(host)) as client,
                ):
                    return bool(client.ping())
                return False

            until(ready, what="that dockerd answers", seconds=PATIENCE_SECONDS)
            yield host
            with contextlib.closing(docker.DockerClient(host)) as client:
                for container in client.containers.list(all=True):
                    container.remove(force=True)
    finally:
        _unmount(directory)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def docker_host() -> Iterator[str]:
    """The address of an engine that holds one image: `busy:1`, a static busybox."""
    with running_engine() as host:
        with contextlib.closing(docker.DockerClient(host)) as client:
            client.api.import_image_from_data(_busybox(), *BASE.split(":"), changes=["ENV PATH=/bin"])
        yield host


def _busybox() -> bytes:
    """A root file system: one program and its names."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(BUSYBOX, "bin/busybox")
        for name in ("sh", "sleep", "httpd", "cat", "echo", "false", "true", "mkdir", "dd", "wget"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    return content.getvalue()


@pytest.fixture
def engine(docker_host: str) -> Iterator[Engine]:
    """The engine with its one image, and a prefix for the names of what a test makes: all of it is gone afterwards."""
    with contextlib.closing(docker.DockerClient(docker_host)) as client:
        yield Engine(docker_host, client, f"t{uuid.uuid4().hex[:8]}")
        for container in client.containers.list(all=True):
            container.remove(force=True, v=True)
        for image in client.images.list():
            for tag in image.tags:
                if tag != BASE:
                    client.images.remove(tag, force=True)
        client.images.prune()  # what was built on others goes before them
        client.networks.prune()
        client.volumes.prune({"all": True})
        client.api.prune_builds(all=True)


@pytest.fixture
def environment(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Describes the environment `dock` by more lines of [docker], and by other tables."""
    path = tmp_path / "dock.toml"
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(path))

    def write(more: str = "") -> None:
        path.write_text(TOML.format(name=NAME, base=tmp_path, host=engine.host, prefix=engine.prefix) + more)

    write()
    return write


@pytest.fixture(scope="session")
def registry() -> Iterator[str]:
    """`127.0.0.1:port` of an empty registry."""
    directory = Path(tempfile.mkdtemp(prefix="ops-registry-"))
    port = free_port()
    configuration = directory / "config.yml"
    configuration.write_text(REGISTRY.format(directory=directory, port=port))
    address = f"127.0.0.1:{port}"
    try:
        with _ended(["docker-registry", "serve", str(configuration)], directory / "log") as child:

            def ready() -> bool:
                assert child.poll() is None, f"the registry ended:\n{(directory / 'log').read_text()[-3000:]}"
                import httpx

                with contextlib.suppress(httpx.HTTPError):
                    return httpx.get(f"http://{address}/v2/").status_code == 200
                return False

            until(ready, what="that the registry answers", seconds=PATIENCE_SECONDS)
            yield address
    finally:
        shutil.rmtree(directory, ignore_errors=True)
