"""What Prefect must have of an environment: blocks as its TOML says, deployments, pools with workers, automations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import prefect
import yaml  # type: ignore[import-untyped]
from prefect.blocks.core import Block
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, get_current_settings

from blocks.environment import Environment
from deployments import automations
from deployments.doctor.host import ANSWER_SECONDS, clock
from deployments.doctor.line import DoctorLine, expect
from deployments.runbooks import has_schedule, has_to_run
from runbook.errors import OpsError, Unreachable

ROOT = Path(__file__).parents[2]
PAGE = 200
HEARTBEAT_SECONDS = 30
# An answer's date is in whole seconds, and uvicorn looks at the clock once a second.
DATE_SECONDS = 2.0
REGISTER = "python -m deployments.deploy --environment {}"


def look_at_api() -> Iterator[DoctorLine]:
    """It answers to this shell's password and to nobody else; its settings are such that locks survive it."""
    address = PREFECT_API_URL.value()
    if not address:
        raise OpsError("PREFECT_API_URL is not set", "set it in this shell, and in the worker's environment file")
    user, _, password = (_secret(PREFECT_API_AUTH_STRING.value())).partition(":")
    if user and not password:
        raise OpsError(
            "PREFECT_API_AUTH_STRING has an empty password",
            "set a password on the server (compose.env: PREFECT_PASSWORD), then here",
        )
    with httpx.Client(base_url=address, timeout=ANSWER_SECONDS, trust_env=False) as client:
        try:
            asked = time.time()
            stranger = client.get("/admin/version")
            answer = client.get("/admin/version", auth=(user, password)) if user else stranger
            answered = time.time()
            login = (user, password) if user else httpx.USE_CLIENT_DEFAULT
            settings = client.get("/admin/settings", auth=login)
            counted = client.post("/flows/count", json={}, auth=login)
        except httpx.HTTPError as error:
            raise Unreachable(f"Prefect at {address} does not answer: {type(error).__name__}", "start it") from None
    if answer.is_error:
        raise OpsError(f"Prefect at {address} answers {answer.status_code}", "correct PREFECT_API_AUTH_STRING")
    if counted.is_error:
        raise OpsError(
            f"Prefect at {address} answers, but its database does not ({counted.status_code})",
            "check Prefect's database and its log: no run can start",
        )
    yield DoctorLine(f"Prefect {answer.json()} at {address} answers")
    yield expect(
        stranger.status_code == httpx.codes.UNAUTHORIZED,
        "Prefect asks for a password",
        "set PREFECT_SERVER_API_AUTH_STRING on the server: anybody may launch a restore",
    )
    yield expect(
        answer.json() == prefect.__version__,
        f"Prefect here is {prefect.__version__}",
        "server and workers of one version: install requirements.lock on both",
    )
    if date := answer.headers.get("date"):
        yield clock("Prefect", parsedate_to_datetime(date).timestamp(), (asked, answered), DATE_SECONDS)
    yield from _settings(settings.json() if settings.is_success else {})


def _settings(told: dict[str, Any]) -> Iterator[DoctorLine]:
    storage = str(told.get("server", {}).get("concurrency", {}).get("lease_storage", "unknown"))
    lasts = "memory" not in storage and storage != "unknown"
    yield expect(
        lasts,
        f"lease storage of the server is {storage}",
        "set PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect_redis.lease_storage: in memory, a lock that is "
        "held when the server restarts stays taken for ever",
    )
    seconds = get_current_settings().flows.heartbeat_frequency
    yield expect(
        seconds == HEARTBEAT_SECONDS,
        f"heartbeat of flows is {seconds or 'off'} (s)",
        f"set PREFECT_FLOWS_HEARTBEAT_FREQUENCY={HEARTBEAT_SECONDS} in every shell and worker: live runs "
        "would be marked Crashed, or dead ones never",
    )


def _secret(value: Any) -> str:
    return str(value.get_secret_value() if hasattr(value, "get_secret_value") else value or "")


def is_registered(env: Environment) -> bool:
    """Whether Prefect knows the environment at all."""
    try:
        Block.load(f"ops-environment/{env.name}")
    except ValueError:
        return False
    return True


def look_at_blocks(env: Environment) -> Iterator[DoctorLine]:
    """Each block is registered, and what the TOML (with this shell's secrets) says."""
    todo = REGISTER.format(env.name)
    named = {**{part: env.slugs[part] for part in env.slugs}, "environment": f"ops-environment/{env.name}"}
    wanted: dict[str, Block] = {**env.parts(), "environment": env}
    for part, slug in named.items():
        try:
            there = Block.load(slug)
        except ValueError:
            yield DoctorLine(f"block {slug} is not registered", todo)
            continue
        own = wanted[part]
        other = [name for name in type(own).model_fields if getattr(there, name, None) != getattr(own, name)]
        yield expect(
            not other,
            f"block {slug} is what the TOML says",
            f"{', '.join(other)} differs: {todo}, if the TOML is right",
        )


def look_at_pools(env: Environment) -> Iterator[DoctorLine]:
    """Each pool has a worker that is there."""
    with get_client(sync_client=True) as client:
        for pool in sorted({env.name, *env.pools.values()}):
            try:
                found = client.read_work_pool(pool)
            except ObjectNotFound:
                yield DoctorLine(f"work pool {pool} is not there", f"prefect work-pool create {pool} --type process")
                continue
            workers = client.read_workers_for_work_pool(pool)
            online = [worker.name for worker in workers if str(worker.status).upper().endswith("ONLINE")]
            yield expect(
                online,
                f"work pool {pool} has {len(online)} workers ({', '.join(online[:5])})",
                "start its worker (systemctl start interview-ops-worker): what is due waits",
            )
            yield expect(not found.is_paused, f"work pool {pool} is open", f"prefect work-pool resume {pool}")


def look_at_deployments(env: Environment) -> Iterator[DoctorLine]:
    """Every runbook is deployed, to the pool that the TOML says; in production no schedule is paused that prefect.yaml
    has active."""
    every = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    entries = [entry for entry in every if has_to_run(entry, env)]
    # A flow may have several entries, each with a name of its own: `daily-check/production-health`.
    wanted = {_named(entry, env.name): entry for entry in entries}
    with get_client(sync_client=True) as client:
        found_there = _deployed(client, sorted({name for _, name in wanted}))
    there = {(str(found.entrypoint), found.name): found for found in found_there}
    missing = [f"{entrypoint} ({name})" for entrypoint, name in wanted if (entrypoint, name) not in there]
    shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
    yield expect(
        not missing,
        f"{len(entries) - len(missing)} of {len(entries)} runbooks are deployed",
        f"{shown}: {REGISTER.format(env.name)}",
    )
    wrong, paused = [], []
    for (entrypoint, name), entry in wanted.items():
        if found := there.get((entrypoint, name)):
            pool = env.pools.get(entrypoint.split(".")[1], env.name)
            wrong += [f"{entrypoint} ({found.work_pool_name})"] if found.work_pool_name != pool else []
            paused += [f"{entrypoint} ({name})"] if has_schedule(entry, env) and _is_paused(entry, found) else []
    yield expect(
        not wrong, "deployments are in the pools of their hosts", f"{', '.join(wrong[:3])}: {REGISTER.format(env.name)}"
    )
    if env.tier == "production":
        yield expect(not paused, "no schedule is paused", f"{', '.join(paused[:5])}: resume it in the UI")


def _named(entry: dict[str, Any], environment: str) -> tuple[str, str]:
    return str(entry["entrypoint"]), str(entry["name"]).replace("{{ $OPS_ENVIRONMENT }}", environment)


def _deployed(client: SyncPrefectClient, names: list[str]) -> list[DeploymentResponse]:
    found: list[DeploymentResponse] = []
    named = DeploymentFilter(name=DeploymentFilterName(any_=names))
    while page := client.read_deployments(deployment_filter=named, limit=PAGE, offset=len(found)):
        found += page
    return found


def _is_paused(entry: dict[str, Any], found: DeploymentResponse) -> bool:
    wanted = [one for one in entry.get("schedules") or [] if one.get("active", True)]
    active = [one for one in found.schedules if one.active]
    return bool(wanted) and (found.paused or len(active) < len(wanted))


def look_at_automations(env: Environment) -> Iterator[DoctorLine]:
    """All are there and on."""
    for name, state in automations.listed(env.name).items():
        todo = f"python -m deployments.automations register --environment {env.name}"
        yield expect(
            state == "on",
            f"automation {name} is {state}",
            todo if state == "missing" else "switch it on in the UI, or say there why it is off",
        )
