"""A stopped database server's container, and throw-away ones of the same image, in which a plan judges that server.

A throw-away container has the image, the user and the mounts of the server's, all of them read-only, and no network. It
can write only to the private instance's directories. It is removed when the plan has judged it; the next plan removes
that of a killed one. https://docs.docker.com/reference/cli/docker/container/create/
"""

from __future__ import annotations

import contextlib
import itertools
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.docker import engine
from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.files import durable, inside
from runbook.kinds import probe
from tasks.cluster.instance import PrivateInstance

LABEL = "ops.trial"
MEMORY_BYTES, MOST_PROCESSES, NANO_PROCESSORS = 1 << 30, 256, 10**9
READ_SECONDS = 60
SCRATCH = ("/tmp", "/run")  # noqa: S108 (of a throw-away container's own)
_OPTION = re.compile(r"([a-z_.]+)=(.*)", re.DOTALL)
# Of its locale, libraries and time zone. The others may be secrets.
_VARIABLE = re.compile(r"(LANG|LANGUAGE|LC_\w+|LOCPATH|TZ|PATH|LD_LIBRARY_PATH|ICU_DATA)=")


@dataclass(frozen=True)
class ServerContainer:
    """A database server's container. `mounts`: directory of this host → its path in the container; `data`: the path of
    the data directory there; `program`: of the server; `settings`: those of its command line."""

    engine: str
    name: str
    image: str
    user: str
    program: str
    mounts: Mapping[str, str]
    data: str
    settings: Mapping[str, str]
    environment: Sequence[str] = ()
    memory_bytes: int = MEMORY_BYTES
    shared_bytes: int = 0


@probe
def read_container(postgres: Postgres, services: DockerServices) -> ServerContainer:
    """The container of a stopped server, by `docker inspect`.

    Raises:
        OpsError: nothing shows what it would run: its engine is on another host, or its mounts lack the data directory.
        Unreachable: the engine does not answer.
    """
    role, live = postgres.service, Path(postgres.data_directory).resolve()
    host, name = services.hosts.get(role, services.host), services.name_of(role)
    if not services.model_copy(update={"host": host}).is_here:
        raise OpsError(f"the Docker Engine of container {name} is on another host: {host}")
    attributes = services.attributes(role)
    own, limits = attributes["Config"], attributes["HostConfig"]
    mounts = {
        str(Path(one["Source"]).resolve()): str(one["Destination"])
        for one in attributes["Mounts"]
        if one["Type"] in ("bind", "volume") and Path(one["Source"]).exists()
    }
    data = _inside(mounts, live if live.exists() else live.parent)
    if not data:
        raise OpsError(f"no mount of container {name} has {live}")
    words = [str(word) for word in (attributes["Path"], *attributes["Args"])]
    uid, gid = shell.owner_of(postgres.os_user)
    return ServerContainer(
        *(host, name, str(attributes["Image"]), f"{uid}:{gid}", _program(live, words), mounts),
        data if live.exists() else f"{data}/{live.name}",
        _options(words),
        [text for text in own.get("Env") or () if _VARIABLE.match(text)],
        int(limits.get("Memory") or MEMORY_BYTES),
        int(limits.get("ShmSize") or 0),
    )


def _inside(mounts: Mapping[str, str], path: Path) -> str:
    """Its path in the container; "": no mount has it."""
    for source in sorted(mounts, key=len, reverse=True):
        if path.is_relative_to(source):
            return str(Path(mounts[source]) / path.relative_to(source))
    return ""


def _program(live: Path, words: Sequence[str]) -> str:
    """By the last start of the server, otherwise by the container's command."""
    with contextlib.suppress(OSError):
        first = inside.read_text(live / "postmaster.opts").split()[:1]
        if first and first[0].startswith("/"):
            return first[0]
    return next((word for word in words if Path(word).name == "postgres"), "postgres")


def _options(words: Sequence[str]) -> dict[str, str]:
    """`-c name=value`, as PostgreSQL's own image hands them on."""
    pairs = (_OPTION.fullmatch(word) for flag, word in itertools.pairwise(words) if flag == "-c")
    return {found[1]: found[2] for found in pairs if found}


def read_setting(container: ServerContainer, settings: Mapping[str, str], name: str) -> str:
    """The value with which the container's server would start: `postgres -C`.

    Raises:
        CommandFailed: its configuration is invalid.
        OpsError, Unreachable: the engine cannot run it.
    """
    argv = ["-D", container.data, *_words(settings), "-C", name]
    with _created(container, argv, {}) as made:
        made.start()
        code = int(made.wait(timeout=READ_SECONDS)["StatusCode"])
        out, err = (made.logs(stdout=out, stderr=not out).decode(errors="replace") for out in (True, False))
    if code:
        raise CommandFailed([container.program, *argv], code, err)
    return str(out).strip()


@contextlib.contextmanager
def serving_in(
    container: ServerContainer, instance: PrivateInstance, settings: Mapping[str, str]
) -> Iterator[ContainerServer]:
    """Run a private instance's server in a throw-away container, which is removed after the block.

    Raises:
        OpsError, Unreachable: the engine cannot run it.
    """
    binds = {str(path): str(path) for path in (instance.root, instance.postgres.host)}
    with _created(container, ["-D", str(instance.data), *_words(settings)], binds, str(instance.root)) as made:
        made.start()
        yield ContainerServer(made, instance)


@dataclass(frozen=True)
class ContainerServer:
    """A server in a throw-away container."""

    container: Any
    instance: PrivateInstance

    def has_ended(self) -> bool:
        """Whether it has; then its log is the instance's."""
        self.container.reload()
        if self.container.attrs["State"]["Status"] in ("created", "running"):
            return False
        with durable.append(self.instance.log) as log:
            log.write(self.container.logs())
        return True


def remove_trials(container: ServerContainer, root: Path) -> None:
    """Remove the throw-away containers of a killed run, whose instance is in `root`.

    Raises:
        OpsError, Unreachable: the engine refuses, or does not answer.
    """
    with engine(container.engine) as client:
        for left in client.containers.list(all=True, filters={"label": f"{LABEL}={root}"}):
            left.remove(force=True, v=True)


def _words(settings: Mapping[str, str]) -> list[str]:
    return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]


@contextlib.contextmanager
def _created(
    container: ServerContainer, argv: Sequence[str], writable: Mapping[str, str], root: str = ""
) -> Iterator[Any]:
    from docker.types import Mount  # slow to import

    # By their directories: a volume that is named here would belong to this container too. A missing directory is an
    # error; the engine would create it for a bind in `volumes`.
    bound = [Mount(target, source, type="bind", read_only=True) for source, target in container.mounts.items()]
    bound += [Mount(target, source, type="bind") for source, target in writable.items()]
    with engine(container.engine, seconds=READ_SECONDS) as client:
        made = client.containers.create(
            container.image,
            list(argv),
            entrypoint=[container.program],
            name=f"ops-trial-{uuid.uuid4().hex[:12]}",
            labels={LABEL: root},
            user=container.user,
            userns_mode="host",
            environment=list(container.environment),
            working_dir="/",
            mounts=bound,
            tmpfs=dict.fromkeys(set(SCRATCH) - set(container.mounts.values()), ""),
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", "label=disable"],
            mem_limit=container.memory_bytes,
            pids_limit=MOST_PROCESSES,
            nano_cpus=NANO_PROCESSORS,
            log_config={"Type": "json-file"},  # its log is read, whatever the engine does with others
            **({"shm_size": container.shared_bytes} if container.shared_bytes else {}),
        )
        try:
            yield made
        finally:
            made.remove(force=True, v=True)
