"""The versions that an environment runs: servers, languages and this program, each read from the running one."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from blocks.docker import engine
from blocks.environment import Environment
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.postgres.server.server import read_server
from tasks.redis.server import connected, version_of

SECONDS = 30


@dataclass(frozen=True)
class Version:
    """A product's version. `product`: its name in the table of releases; `version`: "" if unknown, with `problem`."""

    product: str
    where: str
    version: str
    problem: str = ""


@probe
def read_versions(env: Environment) -> tuple[Version, ...]:
    """The versions of everything in the environment; one that does not answer has its error."""
    return tuple(_versions(env))


def _versions(env: Environment) -> Iterator[Version]:
    if env.has("postgres"):
        for node in env.nodes():
            where = f"{node.service} {node.host}:{node.port}"
            yield _read("postgres", where, lambda node=node: read_server.work(node).text.split()[0])  # type: ignore[misc]
    if env.has("redis"):
        yield _redis(env)
    if env.has("application.python"):
        python = env.application.python
        yield _read("python", f"the backend ({python})", lambda: _program(python, "--version"))
    if env.has("application.web_directory"):
        yield _read("node", "this host", lambda: _program("node", "--version").removeprefix("v"))
    if env.has("docker"):
        yield _read("docker", env.docker.host or "this host", lambda: _docker(env.docker.host))
    yield _read("python", "the worker", lambda: platform.python_version())
    yield from (Version(name, "the worker", metadata.version(name)) for name in ("prefect", "interview-ops"))
    yield _system()


def _read(product: str, where: str, ask: Callable[[], str]) -> Version:
    try:
        return Version(product, where, ask())
    except OpsError as error:
        return Version(product, where, "", error.message)


def _redis(env: Environment) -> Version:
    try:
        with connected(env.redis) as client:
            product, _, version = version_of(client).partition(" ")
            return Version(product, env.redis.address, version)
    except OpsError as error:
        return Version("redis", env.redis.address, "", error.message)


def _program(program: str, *words: str) -> str:
    printed = shell.run([program, *words], timeout_seconds=SECONDS).stdout.split()
    if not printed:
        raise OpsError(f"{program} does not print its version")
    return printed[-1]


def _docker(host: str) -> str:
    with engine(host) as client:
        return str(client.version()["Version"])


def _system() -> Version:
    """The operating system; Debian by its code name, as in the table of releases."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return Version(sys.platform, "the worker", platform.release())
    named = release.get("VERSION_CODENAME", "") if release["ID"] == "debian" else ""
    return Version(
        release["ID"], "the worker", named or release.get("VERSION_ID", ""), "" if release else "no os-release"
    )
