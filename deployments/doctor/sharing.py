"""Environments that describe one database, Redis or directory: each would be changed behind the other's back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from blocks.config import toml
from blocks.environment import Environment
from deployments.doctor.line import DoctorLine, expect
from runbook.errors import OpsError
from runbook.guard.brief import asked_briefly

MOST = 200


def look_at_sharing(env: Environment) -> Iterator[DoctorLine]:
    """What this one describes, by its identity, is described by no other one that can be read here."""
    own = env.exclusion("doctor").identities()
    alone = True
    for other in neighbours(env.name):
        shared = [name for identity, name in other.exclusion("doctor").identities().items() if identity in own]
        for name in shared:
            alone = False
            if env.name in other.shares or other.name in env.shares:
                yield DoctorLine(f"{name} is shared with the environment {other.name}, as declared")
                continue
            yield expect(
                False,
                f"{name} is described by the environment {other.name} too",
                f'correct one of them; if both are right, add shares = ["{other.name}"] to the TOML of {env.name}',
                "one environment for each database, Redis server and directory",
            )
    if alone:
        yield DoctorLine(f"no other environment describes {', '.join(own.values()) or 'anything that can be reached'}")


def neighbours(name: str) -> Iterator[Environment]:
    """The other environments: those registered in Prefect, and those whose TOML and secrets are here."""
    there = registered()
    for other in sorted({*there, *toml.known()} - {name}):
        try:
            yield toml.environment(other)
        except OpsError:  # a template, or its secrets are elsewhere
            if other in there:
                yield cast(Environment, Environment.load(other))


def registered() -> list[str]:
    """Names of the environments that Prefect knows; none where it does not answer."""
    if not PREFECT_API_URL.value():
        return []
    try:
        with asked_briefly(), get_client(sync_client=True) as client:
            documents = client.read_block_documents_by_type("ops-environment", limit=MOST)
    except Exception:  # the doctor reports elsewhere that Prefect does not answer
        return []
    return sorted(str(one.name) for one in documents if one.name)
