"""The service manager: its log-in, and whether it knows each unit, program or container."""

from __future__ import annotations

from collections.abc import Iterator

from blocks.environment import Environment
from deployments.doctor.line import DoctorLine, prefer, refused
from runbook.errors import OpsError, Unreachable

NEEDED = {"postgres": "postgres", "redis": "redis", "application": "backend"}
"""Part → the role whose service a full restore stops and starts."""


def look_at_services(env: Environment) -> Iterator[DoctorLine]:
    """The manager answers to its password; each name in [services] names is one that it knows, and runs."""
    for role, name in env.services.names.items():
        what = f"[services] {role} = {name}"
        try:
            state = env.services.state(role)
        except Unreachable as error:
            yield refused("[services]", error)
            return
        except OpsError as error:
            yield refused(what, error)
            if " answers 401" in error.message:
                return  # one password, one line
            continue
        yield prefer(state.comes_back, f"{what} is {state.told}", "start it, or say why it is stopped", "running")
    for part, role in NEEDED.items():
        if env.has(part) and role not in env.services.names and _is_local(env, part):
            yield prefer(
                False,
                f"[services] names has no {role}",
                f"add {role} to [services] names: a full restore stops and starts it",
                f"the unit, program or container of [{part}]",
            )


def _is_local(env: Environment, part: str) -> bool:
    return part == "application" or not getattr(getattr(env, part), "remote", False)
