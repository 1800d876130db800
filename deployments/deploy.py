"""Everything that an environment has in Prefect, from its TOML: blocks, deployments, automations. Idempotent.

Each runbook goes to the work pool of the host that it is for: `[pools]` in the TOML names one by chapter (database,
redis, application …), the others go to the pool that is called as the environment. The named pools must be there.

OPS_ENVIRONMENT=production OPS_ROOT=/opt/interview-ops python -m deployments.deploy
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from blocks.config import toml
from blocks.environment import Environment
from deployments import automations, entries, start_page
from deployments.maintenance import NAME
from deployments.register import describe_expectations, register
from deployments.runbooks import has_schedule, has_to_run, shown
from runbook.drivers import exit_code
from runbook.errors import OpsError
from tasks.application.worktree import git

ROOT = Path(__file__).parent.parent
KIND_OF_DOCKER, KIND_OF_PROCESS = "docker", "process"
UTC, PAGE = "UTC", 200
REQUIRED = ("postgres", "redis", "prefect_server")
"""One of them: Prefect itself is looked after as an environment too. Every other part of an environment is optional."""
START_HERE = "flows.troubleshooting.start_here.start_here"
AT_ONCE = """sh -c 'exec setsid "$(tr "\\0" "\\n" </proc/$PPID/cmdline | head -n 1)" -m prefect.engine'"""
"""How a process worker begins a run: with the worker's interpreter, in a session of the run's own, on which its
priority depends (tasks/host/priority.py). Without a command Prefect starts a process that prepares the run, and then
the run's: each imports Prefect, which takes a second of every click."""
WAITS = "deployed-paused"
"""A tag of what was deployed with --paused: the next deployment without it resumes that."""


def chapter_of(entry: Mapping[str, Any]) -> str:
    """`redis` of the entrypoint `flows.redis.memory.check.check_redis_memory`."""
    return str(entry["entrypoint"]).split(".")[1]


def chosen(
    content: Mapping[str, Any],
    environment: Environment,
    kinds: Mapping[str, str],
    *,
    paused: bool = False,
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """prefect.yaml for one environment: the runbooks of the parts that it has, each with the pool of its chapter, its
    description as people read it, and its schedules in the environment's time zone (hourly ones stay in UTC).

    `kinds` is the type of each pool. `paused`: schedules wait until somebody resumes them, or the next deployment
    without it does; `kept`: entries that somebody paused, and that stay so. All have the version of this checkout.
    """
    deployments, version = [], {"version": project_version()}
    for entry in filter(lambda entry: has_to_run(entry, environment), content["deployments"]):
        pool = environment.pools.get(chapter_of(entry), environment.name)
        variables = _container() if kinds[pool] == KIND_OF_DOCKER else {}
        own = {"name": pool, **({"job_variables": variables} if variables else {})}
        about = shown(entry["entrypoint"], environment.language)
        told: dict[str, Any] = {"work_pool": own, "description": about, **version}
        if "schedules" in entry:  # what somebody added by hand to another stays
            told["schedules"] = _schedules(entry, environment) if has_schedule(entry, environment) else []
        if called(entry, environment.name) in kept:
            told |= {"paused": True}
        elif paused and told.get("schedules"):
            told |= {"paused": True, "tags": [*entry["tags"], WAITS]}
        deployments.append({**entry, **told})
    return {**content, "deployments": deployments}


def _schedules(entry: Mapping[str, Any], environment: Environment) -> list[dict[str, Any]]:
    zone = environment.timezone
    watched = entry.get("watched_schedules") if environment.has("monitoring.watcher") else None
    return [{**one, "timezone": UTC if one["timezone"] == UTC else zone} for one in watched or entry["schedules"]]


def called(entry: Mapping[str, Any], environment: str) -> str:
    """What Prefect calls an entry of prefect.yaml: `daily-check/production-health`."""
    flow = str(entry["entrypoint"]).rpartition(".")[2].replace("_", "-")
    return f"{flow}/{str(entry['name']).replace(NAME, environment)}"


def project_version() -> str:
    """`3f2a9c1`, the commit of this checkout, with `-dirty` where something was changed in it; in an image the image's
    name: it has no git."""
    with contextlib.suppress(OpsError):
        return git(ROOT, "describe", "--always", "--dirty").strip()
    return os.environ.get("OPS_IMAGE", "unknown")


def _container() -> dict[str, Any]:
    """How a docker worker runs a flow: in the image of the flows, on the host's network, as its user. It needs the
    reports' directory like every other."""
    volumes = os.environ.get("OPS_CONTAINER_VOLUMES", "")
    return {
        "image": os.environ.get("OPS_IMAGE", "interview-ops:latest"),
        "image_pull_policy": os.environ.get("OPS_IMAGE_PULL", "Never"),
        "network_mode": "host",
        "auto_remove": True,
        "volumes": [volume for volume in volumes.split(",") if volume],
        "env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "OPS_ENVIRONMENT": os.environ.get("OPS_ENVIRONMENT", "")},
    }


def prepare_pools(environment: Environment) -> dict[str, str]:
    """Make the environment's own pool where it is missing, and have its process pools begin runs `AT_ONCE`; returns the
    type of each pool that the environment names.

    Raises:
        OpsError: another one is not there, or a chapter that is none has one.
    """
    chapters = {path.name for path in (ROOT / "flows").iterdir() if path.is_dir()}
    if unknown := sorted(set(environment.pools) - chapters):
        raise OpsError(f"[pools] names {', '.join(unknown)}", f"a chapter is one of {', '.join(sorted(chapters))}")
    kinds = {}
    with get_client(sync_client=True) as client:
        for name in sorted({environment.name, *environment.pools.values()}):
            pool = _pool(client, name, is_own=name == environment.name)
            kinds[name] = pool.type
            if pool.type == KIND_OF_PROCESS:
                _begin_at_once(client, pool)
    return kinds


def _pool(client: SyncPrefectClient, name: str, *, is_own: bool) -> WorkPool:
    """A pool; the environment's own is made where it is missing, another host's is made there."""
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        if not is_own:
            hint = f"start its worker, or: prefect work-pool create {name} --type process"
            raise OpsError(f"there is no work pool {name}", hint) from None
    from prefect.workers.process import ProcessWorker  # takes more than a second

    template = ProcessWorker.get_default_base_job_template()
    with contextlib.suppress(ObjectAlreadyExists):  # by this very request, if the client sent it again
        client.create_work_pool(WorkPoolCreate(name=name, type=KIND_OF_PROCESS, base_job_template=template))
    return client.read_work_pool(name)


def _begin_at_once(client: SyncPrefectClient, pool: WorkPool) -> None:
    """Have its workers begin runs with `AT_ONCE`, unless somebody chose another command."""
    template = deepcopy(pool.base_job_template)
    command = template.get("variables", {}).get("properties", {}).get("command")
    if command is not None and not command.get("default"):
        command["default"] = AT_ONCE
        client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=template))


def deploy(name: str, *, paused: bool = False) -> str:
    """Deploy the runbooks of what an environment has, and delete those of parts that it has no more; returns what was
    done. Without `paused` the schedules that `paused` had left waiting begin; what somebody paused stays paused.

    Raises:
        OpsError: the environment has neither PostgreSQL nor Redis, a pool is not there, or Prefect refuses an entry.
    """
    environment = toml.environment(name)
    if not any(map(environment.has, REQUIRED)):
        raise OpsError(
            f"{name} has neither [postgres] nor [redis]", "describe one of them; every other part is optional"
        )
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    there = deployed(content["deployments"], name)
    kept = [one for one, found in there.items() if found.paused and WAITS not in found.tags]
    described = chosen(content, environment, prepare_pools(environment), paused=paused, kept=kept)
    words = {"OPS_ENVIRONMENT": name, "OPS_ROOT": os.environ.get("OPS_ROOT", str(ROOT))}
    runbooks, pull = entries.filled(described["deployments"], words), entries.filled(described["pull"], words)
    finding = list(start_page.symptom_entries(runbooks, name, environment.language, WAITS))
    before = start_page.read_symptom_deployments(name)
    entries.publish([*runbooks, *finding], pull, {**there, **before}, environment.language)
    wanted = {called(entry, name) for entry in content["deployments"] if has_to_run(entry, environment)}
    gone = [found for one, found in there.items() if one not in wanted]
    named = {f"{start_page.flow_in(entry)}/{entry['name']}" for entry in finding}
    left = [found for one, found in before.items() if one not in named]
    with get_client(sync_client=True) as client:
        for found in (*gone, *left):
            with contextlib.suppress(ObjectNotFound):
                client.delete_deployment(found.id)
    now = {**deployed(content["deployments"], name), **start_page.read_symptom_deployments(name)}
    start_page.describe_start(now, name, shown(START_HERE, environment.language), environment.language)
    pools = ", ".join(f"{chapter} → {pool}" for chapter, pool in environment.pools.items())
    scheduled = sum(bool(entry.get("schedules")) for entry in described["deployments"])
    return (
        f"deployed {len(described['deployments'])} runbooks to {name}"
        + (f" ({pools})" if pools else "")
        + f", {scheduled} of them scheduled in {environment.timezone}"
        + (": paused, deploy again without --paused to begin" if paused else "")
        + (f"; deleted {len(gone)} of parts that it has no more" if gone else "")
    )


def deployed(entries: Sequence[Mapping[str, Any]], environment: str) -> dict[str, DeploymentResponse]:
    """What Prefect has of these entries, by what it calls them."""
    names = sorted({called(entry, environment).partition("/")[2] for entry in entries})
    known, found = {called(entry, environment) for entry in entries}, dict[str, DeploymentResponse]()
    wanted, page = DeploymentFilter(name=DeploymentFilterName(any_=names)), list[DeploymentResponse]()
    with get_client(sync_client=True) as client:
        offset = 0
        while page := client.read_deployments(deployment_filter=wanted, limit=PAGE, offset=offset):
            offset += len(page)
            for one in page:
                flow = str(one.entrypoint).rpartition(".")[2].replace("_", "-")
                if f"{flow}/{one.name}" in known:
                    found[f"{flow}/{one.name}"] = one
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--environment", default=os.environ.get("OPS_ENVIRONMENT", ""))
    parser.add_argument(
        "--paused",
        action="store_true",
        help="schedules wait and new automations that start flows are off, until it is deployed without this",
    )
    parser.add_argument("--registered", action="store_true", help="its blocks are in Prefect already")
    given = parser.parse_args()
    try:
        for line in () if given.registered else register(given.environment):
            print(f"registered {line}")
        if not given.registered:
            print("\n".join(describe_expectations(given.environment)))
        print(deploy(given.environment, paused=given.paused))
        for line in automations.register(given.environment, paused=given.paused):
            print(f"registered automation {line}")
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
