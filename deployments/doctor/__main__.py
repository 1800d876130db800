"""What is wrong with an installation, as this host and this shell see it. Each line: OK, WARN or CRITICAL, what was
found, what is expected, the next step. It changes nothing, and works before there is a Prefect server.

python -m deployments.doctor --environment production
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

from prefect.settings import PREFECT_API_URL

from blocks.config import toml
from blocks.environment import Environment
from deployments.doctor import control, databases, host, places, recorder, services
from deployments.doctor.line import DoctorLine, Level, Look, expect, looked, prefer
from deployments.doctor.sharing import look_at_sharing
from deployments.doctor.watcher import look_at_watcher
from deployments.names import find_wrong_names
from deployments.register import describe_expectations
from runbook.drivers import exit_code
from runbook.errors import OpsError

PREFECT = "blocks, work pools, deployments, automations, monitoring, recorded tasks"
OF_PART = {
    "services": services.look_at_services,
    "redis": databases.look_at_redis,
    "postgres": places.look_at_space,
    "application": host.look_at_application,
}


def looks(env: Environment) -> dict[str, Look]:
    """Everything to check, from the ground up."""
    found: dict[str, Look] = {"names": partial(look_at_names, env), "programs": partial(host.look_at_programs, env)}
    found["places"] = partial(places.look_at_places, env)
    for part, postgres in databases.databases(env).items():
        found[f"[{part}]"] = partial(databases.look_at_postgres, env, part, postgres)
    of_part = {
        "free disk space" if part == "postgres" else part: look for part, look in OF_PART.items() if env.has(part)
    }
    found |= {what: partial(look, env) for what, look in of_part.items()}
    found["shared systems"] = partial(look_at_sharing, env)
    return found | {"expectations": partial(look_at_expectations, env)}


def look_at_expectations(env: Environment) -> Iterator[DoctorLine]:
    """Its suites can be read; which of them do not apply."""
    for line in describe_expectations(env.name):
        yield DoctorLine(line.strip())


def looks_at_prefect(env: Environment) -> dict[str, Look]:
    """What Prefect has of it, where it answers."""
    return {
        "blocks": partial(control.look_at_blocks, env),
        "work pools": partial(control.look_at_pools, env),
        "deployments": partial(control.look_at_deployments, env),
        "automations": partial(control.look_at_automations, env),
        "monitoring": partial(look_at_watcher, env),
        "recorded tasks": recorder.look_at_recorder,
    }


def look_at_names(env: Environment) -> Iterator[DoctorLine]:
    """Runbooks that may run unattended, chapters of work pools."""
    mistakes = list(find_wrong_names(env))
    for one in mistakes:
        where = f"[{one.section}] {one.key}" if one.section else one.key
        yield expect(False, f"{where}: {one.found}", "correct the TOML", one.expected)
    if not mistakes:
        yield DoctorLine(f"unattended: {', '.join(env.unattended) or 'nothing'}")


def examine(name: str) -> Iterator[DoctorLine]:
    """Every line, as it is found."""
    try:
        env = toml.environment(name)
    except OpsError as error:
        yield DoctorLine(error.message, error.hint)
        return
    yield DoctorLine(f"the TOML of {name} is read, its secrets are set")
    for what, look in looks(env).items():
        yield from looked(what, look)
    if not PREFECT_API_URL.value():
        yield prefer(
            False,
            f"Prefect is not checked ({PREFECT}): PREFECT_API_URL is not set",
            "start a Prefect server, set it, deploy; then run this again",
        )
        return
    answered = list(looked("Prefect", control.look_at_api))
    yield from answered
    if not answered[0].ok:
        return
    if not control.is_registered(env):
        yield prefer(
            False,
            f"{name} is not deployed in Prefect: not checked ({PREFECT})",
            f"{control.REGISTER.format(name)} --paused; then run this again",
        )
        return
    for what, look in looks_at_prefect(env).items():
        yield from looked(what, look)


def show(lines: Iterable[DoctorLine]) -> int:
    """Print each line as it is found, then how many there are of each level; 1 where something is critical."""
    count: Counter[Level] = Counter()
    for line in lines:
        print(line, flush=True)
        count[line.level] += 1
    print(f"{count['OK']} checks passed, {count['WARN']} warnings, {count['CRITICAL']} critical")
    return int(count["CRITICAL"] > 0)


def main() -> int:
    """The command line: 1 where something is critical."""
    parser = argparse.ArgumentParser(prog="python -m deployments.doctor", description=__doc__)
    parser.add_argument("--environment", default=os.environ.get("OPS_ENVIRONMENT", ""))
    return show(examine(parser.parse_args().environment))


if __name__ == "__main__":
    sys.exit(exit_code(main))
