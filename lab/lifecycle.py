"""Bringing a lab up, and taking it down."""

from __future__ import annotations

import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import region
from lab.control import LabControl
from lab.processes import OsAccount, exclusive
from lab.progress import Tell
from lab.servers import valkey
from lab.servers.binaries import find_binaries, is_wheel
from lab.servers.services import LabServices, supervisor_of
from lab.start import end_orphans, start_services
from lab.state.base import base_directory, checked_name, create_base
from lab.state.environment import prefect_variables, system_variables, ui_url
from lab.state.layout import Layout
from lab.state.state import LabState, Passwords, Ports, is_free, load_state, save, taken_ports
from runbook.errors import OpsError

MEGABYTES = 40
"""How much data a new lab gets."""


def find(name: str) -> LabServices | None:
    """The lab, or a lab's second region, as it was last brought up; None when there is none."""
    layout = Layout(base_directory(), checked_name(name)).first
    state = load_state(layout.state)
    if state is None or state.root != str(layout.root):
        return None
    account = OsAccount.of_servers()
    lab = LabServices(layout, state, find_binaries(layout.base, account, state.postgres_bin), account)
    return lab if name == layout.name else region.of(lab)


def existing(name: str) -> tuple[LabServices, LabControl]:
    """The lab and the Prefect server, running or not.

    Raises:
        OpsError: there is none of that name.
    """
    services = find(name)
    control = LabControl.find(services.layout.base) if services else None
    if services is None or control is None:
        lab = name.removesuffix("-dr")
        option = "" if lab == "lab" else f" --name {lab}"
        raise OpsError(f"there is no lab {name}", f"bring it up: python -m lab up{option}")
    return services, control


def second_region(services: LabServices) -> region.SecondRegion:
    """The second region of a lab, or this one.

    Raises:
        OpsError: an earlier version brought the lab up, and prepared none.
    """
    if isinstance(services, region.SecondRegion):
        return services
    if found := region.of(services):
        return found
    raise OpsError(
        f"the lab {services.layout.name} has no second region yet",
        f"python -m lab up --name {services.layout.name} prepares one",
    )


def prepare(name: str, postgres_bin: str = "") -> LabServices:
    """The directories, ports and passwords of a lab and its second region, nothing started.

    Raises:
        OpsError: the name, the directory or the PostgreSQL cannot be used.
    """
    layout = Layout(_base_for(name), name)
    with exclusive(layout.base / ".base.lock"):  # labs beside each other choose different ports
        services = _prepared(layout, postgres_bin)
        region.prepare(services, taken_ports(layout.base, layout.second.name))
        return services


def _prepared(layout: Layout, postgres_bin: str) -> LabServices:
    account = OsAccount.of_servers()
    state = load_state(layout.state)
    if state is None or state.root != str(layout.root):  # a copied directory: the ports are the original's
        passwords = state.passwords if state else Passwords()
        ports = Ports.chosen(taken_ports(layout.base, layout.name))
        # Only for a new lab: `python -m lab env` sets these variables too, for another one perhaps.
        state = LabState(str(layout.root), ports, passwords, language=os.environ.get("OPS_LAB_LANGUAGE", "en"))
        postgres_bin = postgres_bin or os.environ.get("OPS_LAB_POSTGRES_BIN", "")
    if postgres_bin and not is_wheel(Path(postgres_bin)):
        state = dataclasses.replace(state, postgres_bin=str(Path(postgres_bin).resolve()))
    state = dataclasses.replace(state, ports=state.ports.completed(taken_ports(layout.base, layout.name)))
    services = LabServices(layout, state, find_binaries(layout.base, account, state.postgres_bin), account)
    services.create_directories()
    save(layout.state, state)
    return services


def variables(services: LabServices, control: LabControl) -> dict[str, str]:
    """Everything that `python -m lab env` exports."""
    second = second_region(services)
    first = load_state(second.layout.first.state) or second.state
    return {
        **system_variables(services.layout, first, second.state, services.binaries, services.account),
        **prefect_variables(control.layout, control.state),
    }


def up(
    name: str,
    tell: Tell,
    megabytes: int | None = None,
    postgres_bin: str = "",
    *,
    dr: bool = False,
    runbooks: bool = True,
) -> None:
    """Bring the lab and the Prefect server up, both at the same time; what runs already is left alone.

    `megabytes` of data go into a new lab (default `MEGABYTES`). Its second region is prepared, and its environment
    registered; with `dr` it also gets a worker and deployments of its own. Without `runbooks` neither gets any: flows
    are called where the caller is.

    Raises:
        OpsError: a part does not come up.
    """
    base = _base_for(name)
    with exclusive(base / f".{name}.lock"), ThreadPoolExecutor(max_workers=2) as beside:
        services = _with_free_ports(prepare(name, postgres_bin), tell)
        second = second_region(services)
        second = dataclasses.replace(second, state=_with_free_ports(second, tell).state)
        region.send_users(services, second)
        plane = beside.submit(_control_plane, services, second if dr else None, tell, runbooks)
        prepared = beside.submit(region.bring_up, second, tell)
        try:
            start_services(services, MEGABYTES if megabytes is None else megabytes, tell)
            prepared.result()
        finally:  # a lab whose services are broken is recovered from the Prefect UI
            control = plane.result()
    tell(f"the lab {name} is up: {ui_url(control.state)}")


def down(name: str, tell: Tell, *, remove: bool = False) -> None:
    """Stop the lab's worker and services; `remove` deletes its data too."""
    layout = Layout(base_directory(), checked_name(name))
    if not layout.root.exists():
        tell(f"there is no lab {name}")
        return
    with exclusive(layout.base / f".{layout.first.name}.lock"):
        for place in dict.fromkeys((layout, layout.second)):  # a lab with its second region, or that alone
            _stop(place)
            if remove:
                shutil.rmtree(place.root, ignore_errors=place != layout)
        if remove and layout == layout.first:
            layout.endpoint.unlink(missing_ok=True)
    tell(f"the lab {name} is {'removed' if remove else 'down; its data stays'}")


def _stop(layout: Layout) -> None:
    if control := LabControl.find(layout.base):
        control.stop_worker(layout.name)
    if state := load_state(layout.state):
        supervisor_of(layout, state).shutdown()
    end_orphans(layout)


def down_all(tell: Tell, *, remove: bool = False) -> None:
    """Stop every lab of this base directory, then the Prefect server."""
    base = base_directory()
    for name in dict.fromkeys(Layout(base, name).first.name for name in names(base)):
        down(name, tell, remove=remove)
    if control := LabControl.find(base):
        control.shutdown()
        if remove:
            shutil.rmtree(control.layout.root)
        tell(f"the Prefect server is {'removed' if remove else 'down'}")


def names(base: Path) -> list[str]:
    """The labs of a base directory, and their second regions."""
    return sorted(path.parent.name for path in base.glob("*/state.json") if path.parent.name != "control")


def _base_for(name: str) -> Path:
    if checked_name(name) != Layout(Path(), name).first.name:
        lab = Layout(Path(), name).first.name
        raise OpsError(
            f"{name!r} is the second region of the lab {lab}", f"bring it up with that: python -m lab up --name {lab}"
        )
    return create_base()


def _control_plane(services: LabServices, second: LabServices | None, tell: Tell, runbooks: bool) -> LabControl:
    control = LabControl.prepare(services.layout.base).launch().wait()
    tell(f"Prefect server answers on port {control.state.port}")
    for place in (services, second) if second else (services,):
        name, environment = place.layout.name, variables(place, control)
        control.create_pool(name)
        control.register(name, environment, tell)
        if runbooks:
            control.deploy(name, environment, tell)
            # What a worker writes every second, a deployment would wait for. Tests and benchmarks, which have a base
            # directory of their own, look at every run of their labs: nothing begins there by itself.
            retention = place is services and "OPS_LAB_BASE" not in os.environ
            control.start_worker(name, environment, retention=retention)
    return control


def _with_free_ports(services: LabServices, tell: Tell) -> LabServices:
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
        moved = dataclasses.replace(
            state, ports=Ports.chosen([*taken_ports(layout.base, layout.name), *state.ports.all()])
        )
        save(layout.state, moved)
    return dataclasses.replace(services, state=moved)


def _idle_ports(ports: Ports, running: set[str]) -> tuple[int, ...]:
    of = {
        "postgresql": ports.postgres,
        "postgresql-standby": ports.postgres_standby,
        "redis": ports.redis,
        "redis-replica": ports.redis_replica,
        "ai-providers": ports.ai_providers,
        "grc-backend": ports.backend,
        "grc-frontend": ports.frontend,
        **dict(zip(valkey.SENTINELS, ports.sentinels, strict=True)),
    }
    return tuple(port for name, port in of.items() if name not in running)
