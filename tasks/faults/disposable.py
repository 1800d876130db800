"""What every fault asks first: whether this system may be broken at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.guard.permit import Permit

BREAK = "break"


@dataclass(frozen=True)
class Fault:
    """What was done, and when it began and was complete. `facts` are for the drill's own account of it: whoever has to
    find the fault must not read them."""

    what: str
    began: datetime
    struck: datetime
    facts: dict[str, str] = field(default_factory=dict)


def where_disposable(env: Environment) -> Environment:
    """Where drills and load tests of an environment take place: in itself where it is disposable, else in the one that
    its TOML names as `drill_environment`; itself too where it names none, which `require_disposable` then refuses.

    Raises:
        OpsError: there is no environment of that name, or it shares a server with this one.
    """
    if env.disposable or not env.drill_environment:
        return env
    other = Environment.find(env.drill_environment)
    if shared := _servers(env) & _servers(other):
        raise OpsError(
            f"{other.name} is no place for drills of {env.name}: both are {', '.join(sorted(shared))}",
            f"describe servers of its own in the TOML of {other.name}",
        )
    return other


def _servers(env: Environment) -> set[str]:
    """What a drill would break: by address, as a worker reaches it."""
    found = {f"PostgreSQL at {node.host}:{node.port}" for node in env.nodes()}
    found |= {f"Redis at {env.redis.address}"} if env.has("redis") else set()
    return found | ({f"the application at {env.application.url}"} if env.application.url else set())


def require_disposable(env: Environment) -> None:
    """Raises OpsError where the environment is not one to be broken."""
    if not env.disposable:
        raise OpsError(
            f"{env.name} is not disposable: nothing in it is broken on purpose",
            "name one whose TOML says disposable = true as drill_environment in this one's, and register both",
        )


def require_allowed(env: Environment, permit: Permit, target: str) -> None:
    """That this very thing may be broken now.

    Raises:
        OpsError: the environment is not disposable.
        NotConfirmed: the permit does not name it.
    """
    require_disposable(env)
    permit.require_environment(env.name)
    permit.require(BREAK, target)
