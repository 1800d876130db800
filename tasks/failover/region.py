"""Evidence that a whole region serves no users and takes no writes: otherwise two regions would (§8.3)."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.failover.fencing import ATTEST, CONNECT_SECONDS, FenceEvidence, Fencing, look_for_processes
from tasks.host.disk import is_here

LIVES = (
    "repair it there, or stop all its services (application first) so that nothing restarts them, then run this again: "
    "the new region never has its further writes"
)
_PORTS = {"http": 80, "https": 443}


@probe
def find_region(old: Environment) -> Fencing:
    """Check every address that takes users' writes, what would restart its services, and remaining processes on this
    host. It takes some seconds at most."""
    addresses = addresses_of(old)
    with ThreadPoolExecutor(len(addresses)) as pool:
        rows = list(pool.map(_refuses, addresses, addresses.values()))
    reachable = any(row.holds is not None for row in rows)
    return Fencing(old.name, (*rows, _services(old, reachable=reachable), *_processes(old)))


def addresses_of(env: Environment) -> dict[str, tuple[str, int]]:
    """The addresses of a region's services by name: host (or the directory of a socket) and port."""
    found = {}
    for node in env.nodes():
        found[f"PostgreSQL ({node.service})"] = (node.host, node.port)
    if env.has("application"):
        for name, url in (("backend", env.application.url), ("frontend", env.application.frontend_url)):
            parts = urlsplit(url)
            if parts.hostname:
                found[name] = (parts.hostname, parts.port or _PORTS.get(parts.scheme, 80))
    if env.has("redis"):
        found["Redis"] = (env.redis.host, env.redis.port)
    return found


def _refuses(name: str, place: tuple[str, int]) -> FenceEvidence:
    what, where = f"{name} takes no connections", f"{place[0]}:{place[1]}"
    try:
        _knock(*place)
    except (ConnectionRefusedError, FileNotFoundError):
        return FenceEvidence(what, True, f"{where} refuses them")
    except OSError as error:
        return FenceEvidence(what, None, f"{where} cannot be reached from here ({error})", ATTEST)
    return FenceEvidence(what, False, f"{where} accepts them", LIVES)


def _knock(host: str, port: int) -> None:
    if not host.startswith("/"):
        socket.create_connection((host, port), CONNECT_SECONDS).close()
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
        knocking.settimeout(CONNECT_SECONDS)
        knocking.connect(str(Path(host, f".s.PGSQL.{port}")))


def _services(old: Environment, *, reachable: bool) -> FenceEvidence:
    """It does not wait for a service manager on an unreachable host."""
    what = "nothing restarts its services"
    if not reachable:
        return FenceEvidence(what, None, "not checked: none of its addresses can be reached from here", ATTEST)
    for role, name in old.services.names.items():
        try:
            state, boot = old.services.state(role), old.services.starts_at_boot(role)
        except OpsError as error:
            return FenceEvidence(what, None, error.message, ATTEST)
        if state.comes_back:
            return FenceEvidence(what, False, f"{name}: {state.told}", LIVES)
        if boot:
            return FenceEvidence(
                what,
                False,
                f"{name} is stopped, but starts at boot: {boot}",
                f"{old.services.how_to_disable(role)}, then run this again",
            )
    return FenceEvidence(what, True, "all of them are stopped and disabled")


def _processes(old: Environment) -> list[FenceEvidence]:
    rows = []
    for node in old.nodes():
        data = Path(node.data_directory)
        if is_here(node.host) and data.exists():
            left, _ = look_for_processes(data)
            processes = f"processes {', '.join(map(str, left[:5]))}" if left else "none"
            rows.append(FenceEvidence(f"no process runs in {data}", not left, processes, LIVES))
    return rows
