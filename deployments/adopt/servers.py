"""PostgreSQL and Redis servers of this host, as their processes show them; what starts a process."""

from __future__ import annotations

import configparser
import contextlib
import http.client
import re
import xmlrpc.client
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import docker.errors
import psutil

from blocks.docker import engine
from runbook.errors import OpsError

POSTGRES = ("postgres", "postmaster")
POSTGRES_PORT, REDIS_PORT = 5432, 6379
_REDIS = re.compile(r"(?:redis|valkey)-server")
_TITLE = re.compile(r"\S*(?:redis|valkey)-server\s+\S*?:(\d+)(?P<sentinel>.*\[sentinel\])?")
_CONTAINER = re.compile(r"docker[-/]([0-9a-f]{64})")
_UNIT = re.compile(r"/([^/]+\.service)(?=/|$)")
_PORT_LINE = 3  # of postmaster.pid: https://www.postgresql.org/docs/current/storage-file-layout.html


@dataclass(frozen=True)
class Unit:
    """What starts a process: `kind` as in [services], and the manager's own name for it. `url`, `username`, `password`:
    supervisord's."""

    kind: str
    name: str
    url: str = ""
    username: str = ""
    password: str = ""


@dataclass(frozen=True)
class FoundServerProcess:
    """A server's process: keys of its table in the TOML, and its unit where one is known."""

    port: int
    values: Mapping[str, str]
    unit: Unit | None


def find_postgres() -> list[FoundServerProcess]:
    """Every PostgreSQL server of this host whose process this user can read, by port."""
    return _by_port(_postgres(one) for one in _processes() if _is_postmaster(one))


def find_redis() -> list[FoundServerProcess]:
    """Every Redis or Valkey server of this host, by port; no Sentinels."""
    found = ((one, _TITLE.match(" ".join(one.cmdline()))) for one in _processes() if _REDIS.search(_title(one)))
    return _by_port(_redis(one, int(title[1])) for one, title in found if title and not title["sentinel"])


def find_sentinels() -> list[int]:
    """Ports of the Sentinels of this host."""
    found = (_TITLE.match(" ".join(one.cmdline())) for one in _processes() if _REDIS.search(_title(one)))
    return sorted(int(title[1]) for title in found if title and title["sentinel"])


def _by_port(servers: Iterator[FoundServerProcess | None]) -> list[FoundServerProcess]:
    return sorted((one for one in servers if one), key=lambda one: one.port)


def _processes() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline():
                yield process


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[0]
    return ""


def _is_postmaster(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        return process.name() in POSTGRES and not (parent and parent.name() in POSTGRES)
    return False


def _postgres(process: psutil.Process) -> FoundServerProcess | None:
    with contextlib.suppress(psutil.Error):
        words, given = process.cmdline()[1:], _settings(process.cmdline()[1:])
        data = _option(words, "-D") or given.get("data_directory", "") or _variable(process, "PGDATA")
        port = (
            _port_of(Path(data))
            or _listening(process)
            or int(_option(words, "-p") or given.get("port", "") or POSTGRES_PORT)
        )
        programs = _exe(process).parent
        values = {
            "host": "127.0.0.1",
            "port": str(port),
            "programs": str(programs) if (programs / "pg_dump").exists() else "",
            "data_directory": data,
            "config_file": given.get("config_file", ""),
            "os_user": process.username(),
        }
        return FoundServerProcess(port, values, unit_of(process))
    return None


def _redis(process: psutil.Process, port: int) -> FoundServerProcess | None:
    with contextlib.suppress(psutil.Error):
        program, data = _exe(process), ""
        with contextlib.suppress(psutil.Error):
            data = process.cwd()  # a server changes into its `dir`
        values = {
            "host": "127.0.0.1",
            "port": str(port or REDIS_PORT),
            "data_directory": data,
            "server_program": str(program) if program.name else "",
            "os_user": process.username(),
        }
        return FoundServerProcess(port, values, unit_of(process))
    return None


def _exe(process: psutil.Process) -> Path:
    with contextlib.suppress(psutil.Error):
        return Path(process.exe())
    word = process.cmdline()[0].split()[0]
    return Path(word) if word.startswith("/") else Path()


def _option(words: Sequence[str], flag: str) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith(flag):
            return word.removeprefix(flag) or following
    return ""


def _settings(words: Sequence[str]) -> dict[str, str]:
    """`-c name=value` and `--name=value`."""
    given = [following for word, following in zip(words, [*words[1:], ""], strict=True) if word == "-c"]
    given += [word.removeprefix("--") for word in words if word.startswith("--")]
    return {name.replace("-", "_"): value for name, _, value in (one.partition("=") for one in given)}


def _variable(process: psutil.Process, name: str) -> str:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(name, "")
    return ""


def _port_of(data: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((data / "postmaster.pid").read_text().splitlines()[_PORT_LINE])
    return 0


def _listening(process: psutil.Process) -> int:
    return next(iter(listening_ports(process)), 0)


def listening_ports(process: psutil.Process) -> list[int]:
    """TCP ports that a process listens on; none where this user cannot read them."""
    with contextlib.suppress(psutil.Error, OSError):
        return sorted({one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN})
    return []


def unit_of(process: psutil.Process) -> Unit | None:
    """What starts a process: supervisord above it, or the control group that a container or a unit has."""
    with contextlib.suppress(psutil.Error):
        for parent in process.parents():
            if any("supervisord" in Path(word).name for word in parent.cmdline()[:3]):
                return _program(process, parent)
    with contextlib.suppress(OSError):
        group = Path(f"/proc/{process.pid}/cgroup").read_text()
        if found := _CONTAINER.search(group):
            return Unit("docker", _container(found[1]))
        units = [unit for unit in _UNIT.findall(group) if not unit.startswith("user@")]
        if units:
            return Unit("systemd", units[-1])
    return None


def _container(number: str) -> str:
    """The name of a container: its number changes whenever it is made anew."""
    with contextlib.suppress(OpsError, docker.errors.DockerException), engine("") as client:
        return str(client.containers.get(number).name)
    return number[:12]


def _program(process: psutil.Process, supervisord: psutil.Process) -> Unit | None:
    """supervisord knows its programs by their process; where it does not answer, a process's variables name it."""
    url, username, password = _login(supervisord)
    own = [process, *process.parents()]
    own = own[: next(index for index, one in enumerate(own) if one.pid == supervisord.pid)]
    for one in _programs(url, username, password):
        if one["pid"] in [process.pid for process in own]:
            name = one["name"] if one["group"] == one["name"] else f"{one['group']}:{one['name']}"
            return Unit("supervisor", name, url, username, password)
    for candidate in own:
        if name := _variable(candidate, "SUPERVISOR_PROCESS_NAME"):
            group = _variable(candidate, "SUPERVISOR_GROUP_NAME")
            return Unit("supervisor", name if group in ("", name) else f"{group}:{name}", url, username, password)
    return None


def _programs(url: str, username: str, password: str) -> list[dict[str, Any]]:
    login = b64encode(f"{username}:{password}".encode()).decode()
    headers = [("Authorization", f"Basic {login}")] if username else []
    with (
        contextlib.suppress(OSError, http.client.HTTPException, xmlrpc.client.Error),
        xmlrpc.client.ServerProxy(f"{url}/RPC2", headers=headers, allow_none=True) as server,
    ):
        return cast(list[dict[str, Any]], server.supervisor.getAllProcessInfo())
    return []


def _login(supervisord: psutil.Process) -> tuple[str, str, str]:
    """Address, user and password of its XML-RPC, from its configuration: empty where this user cannot read that."""
    words = supervisord.cmdline()
    long = next((word.partition("=")[2] for word in words if word.startswith("--configuration=")), "")
    path = Path(_option(words, "-c") or long or "/etc/supervisor/supervisord.conf")
    read = configparser.RawConfigParser(strict=False, inline_comment_prefixes=(";", " #"))
    with contextlib.suppress(OSError, configparser.Error):
        read.read_string((Path(supervisord.cwd()) / path).read_text())
    if not read.has_section("inet_http_server"):
        return "", "", ""
    login = read["inet_http_server"]
    host, _, port = login.get("port", "").rpartition(":")
    here = host if host not in ("", "*", "0.0.0.0") else "127.0.0.1"  # noqa: S104
    return f"http://{here}:{port}", login.get("username", ""), login.get("password", "")
