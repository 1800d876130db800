"""Whether a system may be broken: every fault checks this first."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from blocks.environment import Environment
from runbook.errors import OpsError

BREAK = "break"


@dataclass(frozen=True)
class Fault:
    """What was done, when it began and when it was complete. `facts` are for the drill's verdict: its diagnosis must
    not read them."""

    what: str
    began: datetime
    struck: datetime
    facts: dict[str, str] = field(default_factory=dict)


def where_disposable(env: Environment) -> Environment:
    """The environment for drills and load tests: itself if it is disposable, else its `drill_environment`. Without one
    it is itself, which `require_disposable` refuses.

    Raises:
        OpsError: there is no environment of that name, or it shares a server with this one.
    """
    if env.disposable or not env.drill_environment:
        return env
    other = Environment.find(env.drill_environment)
    if shared := _servers(env) & _servers(other):
        raise OpsError(
            f"{other.name} cannot be used for drills of {env.name}: both use {', '.join(sorted(shared))}",
            f"give {other.name} its own servers in its TOML",
        )
    return other


def _servers(env: Environment) -> set[str]:
    """The servers that a drill would break, by address."""
    found = {f"PostgreSQL at {node.host}:{node.port}" for node in env.nodes()}
    found |= {f"Redis at {env.redis.address}"} if env.has("redis") else set()
    return found | ({f"the application at {env.application.url}"} if env.application.url else set())


def require_disposable(env: Environment) -> None:
    """Raises OpsError if the environment must not be broken."""
    if not env.disposable:
        raise OpsError(
            f"{env.name} is not disposable: drills must not break it",
            "set drill_environment in its TOML to an environment with disposable = true, and register both",
        )
