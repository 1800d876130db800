"""A Debian with systemd as its init, PostgreSQL, Redis and the application's user, as an image of the tests' engine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from lab.processes import run
from tests.fixtures.engine import Engine, running_engine
from tests.fixtures.servers import programs_base

IMAGE = "interview-host:1"
USER = 4003
"""The application's user: no host that runs these tests has a name for that number."""
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "openssh-server",
    "postgresql",
    "redis-server",
    "python3",
    "python3-venv",
)
UNREAD = ("doc", "man", "locale")
STEPS = (
    f"useradd --uid {USER} --home-dir /opt/grc grc",
    "chmod 755 /root",  # where a tests' Python may be
    "systemctl disable ssh",  # port 22 is this machine's own, and so are its terminals
    "systemctl mask getty.target systemd-modules-load",
    "systemctl mask tmp.mount",  # the checkout may be there
)
BUILD_SECONDS = 1500


def root_file_system() -> Path:
    """A tar of it, made once on a machine: of this host's own release, so that its Python and programs run in there."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    sources = next(
        path for path in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list") if Path(path).exists()
    )
    argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    argv += ["--dpkgopt=force-unsafe-io", *(f"--dpkgopt=path-exclude=/usr/share/{what}/*" for what in UNREAD)]
    argv += [f'--customize-hook=chroot "$1" {step}' for step in STEPS]
    with programs_base() as base:
        recipe = hashlib.sha256("\0".join([*argv, release]).encode()).hexdigest()[:12]
        made = base.parent / f"{release}-{recipe}.tar"
        if not made.exists():
            partial = made.with_suffix(".new.tar")
            run([*argv, release, str(partial), sources], environment=dict(os.environ), seconds=BUILD_SECONDS)
            partial.rename(made)
    return made


@pytest.fixture(scope="session")
def host_engine() -> Iterator[Engine]:
    """An engine of its own that holds `IMAGE`: other tests clean theirs."""
    with running_engine() as address, contextlib.closing(docker.DockerClient(address, timeout=300)) as client:
        client.api.import_image_from_file(str(root_file_system()), *IMAGE.split(":"))
        yield Engine(address, client)
