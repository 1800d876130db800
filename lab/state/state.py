"""What a lab must remember: its ports, its passwords, which PostgreSQL it runs. Kept in state.json, mode 0600."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import secrets
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from lab.processes import write
from runbook.errors import OpsError

PORTS = range(*map(int, os.environ.get("OPS_LAB_PORTS", "20000-32000").split("-")))
"""Below the range from which Linux takes the local ports of outgoing connections; `OPS_LAB_PORTS` is a part of it."""


@dataclass(frozen=True)
class Ports:
    """TCP ports on 127.0.0.1."""

    postgres: int
    redis: int
    backend: int
    frontend: int
    ai_providers: int
    supervisor: int
    redis_replica: int = 0
    sentinel_1: int = 0
    sentinel_2: int = 0
    sentinel_3: int = 0
    postgres_standby: int = 0

    @property
    def sentinels(self) -> tuple[int, ...]:
        """Of the three Sentinels, in order."""
        return self.sentinel_1, self.sentinel_2, self.sentinel_3

    def completed(self, taken: Collection[int] = ()) -> Ports:
        """These ports, with free ones for what a lab of an earlier version did not have (0)."""
        found = dataclasses.asdict(self)
        for name in [name for name, port in found.items() if not port]:
            found[name] = free_port([*taken, *found.values()])
        return Ports(**found)

    @classmethod
    def chosen(cls, taken: Collection[int] = ()) -> Ports:
        """Free ports that are not in `taken`."""
        ports: list[int] = []
        for _ in dataclasses.fields(cls):
            ports.append(free_port([*taken, *ports]))
        return cls(*ports)

    def all(self) -> tuple[int, ...]:
        """Every port."""
        return dataclasses.astuple(self)


@dataclass(frozen=True)
class Passwords:
    """Random per lab; never on a command line."""

    postgres: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    postgres_admin: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    redis: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    supervisor: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    application: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)


@dataclass(frozen=True)
class LabState:
    """One lab. `root` tells a copied directory from the original; `postgres_bin` is "" for the wheel's PostgreSQL;
    `language` is its operators'."""

    root: str
    ports: Ports
    passwords: Passwords = field(default_factory=Passwords)
    postgres_bin: str = ""
    language: str = "en"


@dataclass(frozen=True)
class ControlState:
    """The Prefect server."""

    root: str
    port: int
    supervisor_port: int
    supervisor_password: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    password: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @property
    def login(self) -> tuple[str, str]:
        """User and password of the Prefect API."""
        return "ops", self.password


def load_state(path: Path) -> LabState | None:
    """None when there is no lab.

    Raises:
        OpsError: the file is there and cannot be read.
    """
    try:
        raw = json.loads(path.read_text())
        ports, passwords = Ports(**raw["ports"]), Passwords(**raw["passwords"])
        return LabState(raw["root"], ports, passwords, raw["postgres_bin"], raw.get("language", "en"))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise OpsError(f"{path} may not be read", "run the lab as the user who made it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OpsError(f"{path} is damaged: {error}", f"remove {path.parent} and run `make lab`") from error


def load_control(path: Path) -> ControlState | None:
    """None when no Prefect server was set up yet.

    Raises:
        OpsError: the file is there and cannot be read.
    """
    try:
        raw = json.loads(path.read_text())
        state = ControlState(**raw)
        if "password" not in raw:  # set up by an earlier version, whose Prefect had no log-in
            save(path, state)
        return state
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise OpsError(f"{path} may not be read", "run the lab as the user who made it") from error
    except (ValueError, TypeError) as error:
        raise OpsError(f"{path} is damaged: {error}", f"remove {path.parent} and run `make lab`") from error


def save(path: Path, state: LabState | ControlState) -> None:
    """Write it, mode 0600."""
    write(path, json.dumps(dataclasses.asdict(state), indent=2) + "\n", 0o600)


def taken_ports(base: Path, but: str = "") -> list[int]:
    """What the labs of a base directory (but one) and its Prefect server have chosen. They may be down: nobody who
    looks for a free port sees these."""
    found: list[int] = []
    for path in base.glob("*/state.json"):
        if path.parent.name == but:
            continue
        with contextlib.suppress(FileNotFoundError, ValueError):  # removed meanwhile; damaged, as its own start says
            raw = json.loads(path.read_text())
            found += [raw[name] for name in ("port", "supervisor_port") if name in raw]
            found += raw.get("ports", {}).values()
    return found


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with contextlib.closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(1)
        except OSError:
            return False
    return True


def is_listening(port: int) -> bool:
    """Return True if anybody accepts connections there. Unlike `is_free` this never takes the port for a moment."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def free_port(taken: Collection[int] = (), preferred: int = 0) -> int:
    """`preferred` where that is free, else one that nobody listens on."""
    if preferred and preferred not in taken and is_free(preferred):
        return preferred
    candidates = random.sample(PORTS, k=len(PORTS))
    port = next((port for port in candidates if port not in taken and is_free(port)), None)
    if port is None:
        raise OpsError(f"no free port between {PORTS.start} and {PORTS.stop} on 127.0.0.1")
    return port
