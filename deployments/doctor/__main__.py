"""What is wrong with an installation, as this host and this shell see it.

python -m deployments.doctor --environment production
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from functools import partial

from blocks import toml
from blocks.environment import Environment
from deployments.doctor import control, host
from deployments.doctor.line import Line, Look, looked
from deployments.doctor.watcher import look_at_watcher
from deployments.register import describe_expectations
from runbook.errors import OpsError

OF_PART = {"redis": host.look_at_redis, "application": host.look_at_application}


def looks(env: Environment) -> dict[str, Look]:
    """Everything to look at, from the ground up."""
    found: dict[str, Look] = {"programs": partial(host.look_at_programs, env)}
    found["places"] = partial(host.look_at_places, env)
    for part, postgres in host.databases(env).items():
        found[part] = partial(host.look_at_postgres, part, postgres)
    found |= {part: partial(look, env) for part, look in OF_PART.items() if env.has(part)}
    found["expectations"] = partial(look_at_expectations, env)
    return found


def look_at_expectations(env: Environment) -> Iterator[Line]:
    """Its suites can be read; which of them do not apply."""
    for line in describe_expectations(env.name):
        yield Line(line.strip())


def looks_at_prefect(env: Environment) -> dict[str, Look]:
    """What Prefect has of it, where it answers."""
    return {
        "blocks": partial(control.look_at_blocks, env),
        "work pools": partial(control.look_at_pools, env),
        "deployments": partial(control.look_at_deployments, env),
        "automations": partial(control.look_at_automations, env),
        "monitoring": partial(look_at_watcher, env),
    }


def examine(name: str) -> Iterator[Line]:
    """Every line, as it is found."""
    try:
        env = toml.environment(name)
    except OpsError as error:
        yield Line(error.message, error.hint)
        return
    yield Line(f"the TOML of {name} is read, its secrets are set")
    for what, look in looks(env).items():
        yield from looked(what, look)
    answered = list(looked("Prefect", control.look_at_api))
    yield from answered
    if answered[0].ok:
        for what, look in looks_at_prefect(env).items():
            yield from looked(what, look)


def main() -> int:
    """The command line: 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m deployments.doctor", description=__doc__)
    parser.add_argument("--environment", default=os.environ.get("OPS_ENVIRONMENT", ""))
    wrong = count = 0
    for line in examine(parser.parse_args().environment):
        print(line, flush=True)
        count, wrong = count + 1, wrong + (not line.ok)
    print(f"{wrong} of {count} are wrong" if wrong else f"all {count} are well")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
