"""What a lab is and how it is doing, for people and for programs."""

from __future__ import annotations

from typing import Any

from lab.control import LabControl
from lab.lifecycle import find
from lab.servers import postgres, valkey
from lab.servers.nodes import Node
from lab.servers.replication import RECEIVER_PROGRAM
from lab.servers.services import LabServices
from lab.servers.supervision import Service
from lab.state.environment import api_url, auth_string, ui_url
from lab.state.state import LabState
from runbook.errors import Unreachable


def read_status(name: str) -> dict[str, Any]:
    """The object that `python -m lab status --json` prints; `running` says whether services and Prefect are managed.

    Raises:
        OpsError: the name cannot be one, or the lab's files may not be read.
    """
    services = find(name)
    if services is None:
        return {"environment": name, "running": False}
    control = LabControl.find(services.layout.base)
    healthy = control is not None and control.is_healthy()
    supervised = _supervised(services)
    return {
        "environment": name,
        "running": healthy and bool(supervised),
        "root": str(services.layout.root),
        "prefect_api": api_url(control.state) if control else "",
        "prefect_auth": auth_string(control.state) if control else "",
        "prefect_ui": ui_url(control.state) if control else "",
        "prefect_running": healthy,
        **_resources(services, supervised),
    }


def as_table(status: dict[str, Any]) -> str:
    """The same for people, without passwords."""
    if "services" not in status:
        return f"The lab {status['environment']} does not exist. Bring it up: make lab\n"
    rows = [
        (name, f"running, pid {row['pid']}" if row["running"] else "stopped")
        for name, row in status["services"].items()
    ]
    rows += [
        ("prefect", status["prefect_ui"] if status["prefect_running"] else "stopped"),
        ("application", status["application"]["url"]),
        ("pages", status["frontend"]["url"]),
        ("files", status["root"]),
    ]
    state = "up" if status["running"] else "down"
    return f"The lab {status['environment']} is {state}.\n" + "".join(f"  {name:18} {text}\n" for name, text in rows)


def _supervised(services: LabServices) -> dict[str, Service]:
    supervisor = services.supervisor
    try:
        return supervisor.services() if supervisor.is_running() else {}
    except Unreachable:
        return {}


def _resources(services: LabServices, supervised: dict[str, Service]) -> dict[str, Any]:
    layout, state = services.layout, services.state
    names = [program.name for program in services.programs()]
    pids = {name: supervised[name].pid if name in supervised else 0 for name in names}
    primary, standby = (_node(node, state, pids) for node in services.nodes)
    return {
        "postgres": {**primary, "bin": str(services.binaries.postgres)},
        "standby": standby,
        "wal": {"directory": str(layout.wal), "pid": pids[RECEIVER_PROGRAM] or None},
        "redis": {"url": valkey.master_url(state), "data": str(layout.redis_data), "pid": pids["redis"] or None},
        "application": {"url": services.url},
        "frontend": {"url": f"http://127.0.0.1:{state.ports.frontend}"},
        "services": {
            name: {"running": name in supervised and supervised[name].running, "pid": pids[name] or None}
            for name in names
        },
        "stores": {
            "postgres": str(layout.store("postgresql")),
            **{name: str(layout.store(name)) for name in ("redis", "files", "cluster", "wal")},
            "reports": str(layout.reports),
        },
        "endpoint": str(layout.endpoint),
    }


def _node(node: Node, state: LabState, pids: dict[str, int]) -> dict[str, Any]:
    return {
        "dsn": postgres.dsn(state, node.port),
        "admin_dsn": postgres.admin_dsn(state, node.port),
        "data": str(node.data),
        "pid": pids[node.program] or None,
    }
