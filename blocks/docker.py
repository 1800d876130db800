"""A Docker Engine, its registry, and the application's containers, by the blocks of prefect-docker."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prefect.blocks.core import Block
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from runbook.errors import OpsError, Unreachable, excerpt

if TYPE_CHECKING:  # slow to import, and few flows need it
    import docker.errors
    from prefect_docker.credentials import DockerRegistryCredentials

CALL_SECONDS = 30
SOCKET = "unix:///var/run/docker.sock"


def _size(text: object) -> object:
    """A size as in Docker Compose: "512m"; a number is bytes."""
    import docker.errors
    from docker.utils import parse_bytes

    try:
        return parse_bytes(text)
    except docker.errors.DockerException:
        raise ValueError(f"{text} is no size; write it like 512m") from None


Size = Annotated[int, BeforeValidator(_size)]


class Container(BaseModel):
    """One container of the application, with the keys of Docker Compose. Its default limits are the manual's (§4.2)."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="the repository, without registry and tag: backend")
    name: str = Field(default="", description="name of the container; empty: its key")
    dockerfile: str = Field(default="", description="path in [docker] checkout; empty: not built here")
    context: str = Field(default=".", description="build context in [docker] checkout")
    command: list[str] = []
    network: str = "bridge"
    ports: dict[str, int] = Field(default={}, description='"8000/tcp" = 8000')
    volumes: list[str] = Field(default=[], description="name-or-path:/path[:ro]")
    env_file: str = Field(default="", description="NAME=value lines, on the worker's host")
    test: list[str] = Field(default=[], description="a command in a new image that proves it: update-base-images")
    health: list[str] = Field(default=[], description="a command in the container; empty: the image's own")
    memory: Size = Field(default=512 << 20, description="mem_limit")
    reservation: Size = Field(default=256 << 20, description="mem_reservation")
    cpus: float = Field(default=0.5, gt=0)
    restart: Literal["no", "always", "unless-stopped", "on-failure"] = "unless-stopped"


class Docker(Block):
    """The engine that runs the application's containers."""

    _block_type_name = "Ops Docker"
    _block_type_slug = "ops-docker"

    host: str = Field(default="", description="unix:///… or tcp://…; empty: this host's own")
    registry: str = Field(default="", description="host[:port][/path]; empty: no registry")
    username: str = Field(default="", description="login of the registry")
    password: SecretStr = SecretStr("")
    checkout: str = Field(default="", description="the git checkout that images are built from")
    containers: dict[str, Container] = Field(default={}, description="role → its container")

    def repository(self, role: str) -> str:
        """The image of a role, with its registry, without a tag."""
        image = self.container(role).image
        return f"{self.registry}/{image}" if self.registry else image

    def container(self, role: str) -> Container:
        """The container of a role.

        Raises:
            OpsError: the environment names none.
        """
        if role not in self.containers:
            known = ", ".join(self.containers) or "none"
            raise OpsError(f"the environment names no container {role}", f"add [docker.containers.{role}] ({known})")
        return self.containers[role]

    def name_of(self, role: str) -> str:
        """The name of a role's container."""
        return self.container(role).name or role

    def credentials(self) -> DockerRegistryCredentials | None:
        """The registry's credentials as prefect-docker's block; None without a login."""
        from prefect_docker.credentials import DockerRegistryCredentials

        if not self.username:
            return None
        registry = self.registry.partition("/")[0]
        return DockerRegistryCredentials(username=self.username, password=self.password, registry_url=registry)

    def login(self, reference: str) -> dict[str, str] | None:
        """The login for an image of the registry, as the SDK's `auth_config`. Other registries never get it.

        Not the block's own `login`: the engine's answer would depend on a credential helper of the worker's user, and
        a rollback to a local image must work while the registry is unreachable.
        """
        found = self.credentials()
        if not found or not reference.startswith(f"{found.registry_url}/"):
            return None
        return {"username": found.username, "password": found.password.get_secret_value()}


@contextlib.contextmanager
def engine(host: str, *, seconds: int = 0) -> Iterator[Any]:
    """A Docker SDK client of prefect-docker's host block. `seconds`: how long the engine may be silent after its first
    answer.

    Raises:
        Unreachable: the engine does not answer, or stops answering inside the block.
        OpsError: it refuses an operation; the message quotes it.
    """
    import docker.errors  # slow to import, as all of these, and few flows need them
    from prefect_docker.host import DockerHost
    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError

    where, silent = host or os.environ.get("DOCKER_HOST") or SOCKET, CALL_SECONDS
    try:
        with DockerHost(base_url=host or None, timeout=CALL_SECONDS).get_client() as client:
            silent = client.api.timeout = seconds or CALL_SECONDS
            yield client
    except docker.errors.APIError as error:
        raise OpsError(f"Docker at {where} refuses: {words(error)}", "check its log: journalctl -u docker") from None
    except (docker.errors.DockerException, RequestException, HTTPError) as error:
        raise _unreachable(where, error, silent) from None
    except Exception as error:
        shape = isinstance(error, (KeyError, TypeError, AttributeError, ValueError))
        if (
            not shape and type(error) is not Exception
        ):  # the SDK raises a bare Exception for an answer that it cannot parse
            raise
        found = f"{type(error).__name__} {excerpt(str(error))}"
        raise OpsError(
            f"the program that answers at {where} is not a supported Docker Engine: {found}",
            "correct host under [docker], or check the engine's version",
        ) from error


def words(error: docker.errors.APIError) -> str:
    """The engine's error message in one line."""
    said = error.explanation or error
    return excerpt(said.decode(errors="replace") if isinstance(said, bytes) else str(said), 500)


def _unreachable(where: str, error: Exception, seconds: int) -> OpsError:
    text = repr(error)
    if "PermissionError" in text or "Permission denied" in text:
        return OpsError(f"this user may not access Docker at {where}", "add the worker's user to the group docker")
    if "timed out" in text.lower():
        return Unreachable(f"Docker at {where} does not answer within {seconds} s", "check it: journalctl -u docker")
    if any(sign in text for sign in ("FileNotFoundError", "refused", "aborted", "Failed to establish", "Errno")):
        return Unreachable(
            f"Docker at {where} does not answer", "start it (systemctl start docker), or correct host under [docker]"
        )
    return OpsError(
        f"the program that answers at {where} is no Docker: {excerpt(str(error), 200)}", "correct host under [docker]"
    )
