"""Bringing a lab up, and taking it down."""

from __future__ import annotations

import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import valkey
from lab.binaries import find_binaries, is_wheel
from lab.control import Control
from lab.environment import lab_variables, prefect_variables, ui_url
from lab.layout import Layout, base_directory, checked_name, create_base
from lab.processes import Account, exclusive
from lab.progress import Tell
from lab.services import Services, supervisor_of
from lab.start import end_orphans, start_services
from lab.state import Passwords, Ports, State, is_free, load_state, save
from runbook.errors import OpsError

MEGABYTES = 40
"""How much data a new lab gets."""


def find(name: str) -> Services | None:
    """The lab as it was last brought up; None when there is none."""
    layout = Layout(base_directory(), checked_name(name))
    state = load_state(layout.state)
    if state is None or state.root != str(layout.root):
        return None
    account = Account.of_servers()
    return Services(layout, state, find_binaries(layout.base, account, state.postgres_bin), account)


def existing(name: str) -> tuple[Services, Control]:
    """The lab and the Prefect server, running or not.

    Raises:
        OpsError: there is none of that name.
    """
    services = find(name)
    control = Control.find(services.layout.base) if services else None
    if services is None or control is None:
        option = "" if name == "lab" else f" --name {name}"
        raise OpsError(f"there is no lab {name}", f"bring it up: python -m lab up{option}")
    return services, control


def prepare(name: str, postgres_bin: str = "") -> Services:
    """The lab's directories, ports and passwords, nothing started.

    Raises:
        OpsError: the name, the directory or the PostgreSQL cannot be used.
    """
    layout = Layout(_base_for(name), name)
    with exclusive(layout.base / ".base.lock"):  # labs beside each other choose different ports
        return _prepared(layout, postgres_bin)


def _prepared(layout: Layout, postgres_bin: str) -> Services:
    account = Account.of_servers()
    state = load_state(layout.state)
    if state is None or state.root != str(layout.root):  # a copied directory: the ports are the original's
        passwords = state.passwords if state else Passwords()
        state = State(str(layout.root), Ports.chosen(_taken(layout)), passwords)
        # Only for a new lab: `python -m lab env` sets this variable too, for another one perhaps.
        postgres_bin = postgres_bin or os.environ.get("OPS_LAB_POSTGRES_BIN", "")
    if postgres_bin and not is_wheel(Path(postgres_bin)):
        state = dataclasses.replace(state, postgres_bin=str(Path(postgres_bin).resolve()))
    state = dataclasses.replace(state, ports=state.ports.completed(_taken(layout)))
    services = Services(layout, state, find_binaries(layout.base, account, state.postgres_bin), account)
    services.create_directories()
    save(layout.state, state)
    return services


def variables(services: Services, control: Control) -> dict[str, str]:
    """Everything that `python -m lab env` exports."""
    return {
        **lab_variables(services.layout, services.state, services.binaries, services.account),
        **prefect_variables(control.layout, control.state),
    }


def up(name: str, tell: Tell, megabytes: int | None = None, postgres_bin: str = "") -> None:
    """Bring the lab and the Prefect server up, both at the same time; what runs already is left alone.

    `megabytes` of data go into a new lab (default `MEGABYTES`).

    Raises:
        OpsError: a part does not come up.
    """
    base = _base_for(name)
    with exclusive(base / f".{name}.lock"), ThreadPoolExecutor(max_workers=1) as beside:
        services = _with_free_ports(prepare(name, postgres_bin), tell)
        plane = beside.submit(_control_plane, services, tell)
        try:
            start_services(services, MEGABYTES if megabytes is None else megabytes, tell)
        finally:  # a lab whose services are broken is recovered from the Prefect UI
            control = plane.result()
    tell(f"the lab {name} is up: {ui_url(control.state)}")


def down(name: str, tell: Tell, *, remove: bool = False) -> None:
    """Stop the lab's worker and services; `remove` deletes its data too."""
    layout = Layout(base_directory(), checked_name(name))
    if not layout.root.exists():
        tell(f"there is no lab {name}")
        return
    with exclusive(layout.base / f".{name}.lock"):
        if control := Control.find(layout.base):
            control.stop_worker(name)
        if state := load_state(layout.state):
            supervisor_of(layout, state).shutdown()
        end_orphans(layout)
        if remove:
            shutil.rmtree(layout.root)
    tell(f"the lab {name} is {'removed' if remove else 'down; its data stays'}")


def down_all(tell: Tell, *, remove: bool = False) -> None:
    """Stop every lab of this base directory, then the Prefect server."""
    base = base_directory()
    for name in names(base):
        down(name, tell, remove=remove)
    if control := Control.find(base):
        control.shutdown()
        if remove:
            shutil.rmtree(control.layout.root)
        tell(f"the Prefect server is {'removed' if remove else 'down'}")


def names(base: Path) -> list[str]:
    """The labs of a base directory."""
    return sorted(path.parent.name for path in base.glob("*/state.json") if path.parent.name != "control")


def _base_for(name: str) -> Path:
    checked_name(name)
    return create_base()


def _control_plane(services: Services, tell: Tell) -> Control:
    name, control = services.layout.name, Control.prepare(services.layout.base).launch()
    environment = variables(services, control)
    control.wait()
    tell(f"Prefect server answers on port {control.state.port}")
    control.create_pool(name)
    control.start_worker(name, environment)
    control.deploy(name, environment, tell)
    return control


def _taken(layout: Layout) -> list[int]:
    """Ports of the other labs of this base directory, which may be down."""
    states = (load_state(Layout(layout.base, name).state) for name in names(layout.base) if name != layout.name)
    return [port for state in states if state for port in state.ports.all()]


def _with_free_ports(services: Services, tell: Tell) -> Services:
    """The same lab, on other ports where a stranger listens on one of its own."""
    layout, state, supervisor = services.layout, services.state, services.supervisor
    if supervisor.is_running():
        running = supervisor.services()
        idle = _idle_ports(state.ports, {name for name, service in running.items() if service.pid})
    else:
        end_orphans(layout)
        idle = state.ports.all()
    if all(is_free(port) for port in idle):
        return services
    tell("somebody else listens on a port of this lab: it gets new ones")
    supervisor.shutdown()
    with exclusive(layout.base / ".base.lock"):
        moved = dataclasses.replace(state, ports=Ports.chosen([*_taken(layout), *state.ports.all()]))
        save(layout.state, moved)
    return dataclasses.replace(services, state=moved)


def _idle_ports(ports: Ports, running: set[str]) -> tuple[int, ...]:
    of = {
        "postgresql": ports.postgres, "redis": ports.redis, "ai-providers": ports.ai_providers,
        "grc-backend": ports.backend, "grc-frontend": ports.frontend, "redis-replica": ports.redis_replica,
        **dict(zip(valkey.SENTINELS, ports.sentinels, strict=True)),
    }  # fmt: skip
    return tuple(port for name, port in of.items() if name not in running)
