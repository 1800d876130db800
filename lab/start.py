"""Starting the lab's services, in order, and giving a new lab its data."""

from __future__ import annotations

import signal
from collections.abc import Callable

import httpx
import psycopg
import redis

from lab import postgres, seed, valkey
from lab.environment import clean_environment
from lab.layout import PYTHON, Layout
from lab.processes import end, marked, run, server_at
from lab.progress import Tell
from lab.services import APPLICATION, REDIS, Services
from runbook.errors import OpsError, Unreachable
from runbook.wait import until

_MONITOR = "monitor"


def start_services(services: Services, megabytes: int, tell: Tell) -> None:
    """Start what does not run; a new lab gets its cluster, its database and `megabytes` of data.

    Raises:
        OpsError: a service does not come up, or the data directory of a lab that had one is gone.
    """
    state, supervisor = services.state, services.supervisor
    if services.provisioned.exists() and not services.layout.postgres_data.exists():
        raise OpsError(
            f"{services.layout.postgres_data} is gone: a recovery is at work, or it was lost",
            f"recover it with the runbooks, or remove {services.layout.root} to start anew",
        )
    if postgres.create_cluster(services.layout, state, services.binaries, services.account):
        tell("PostgreSQL cluster created")
    changed = services.configure()
    if changed and supervisor.is_running():
        tell("the configuration is new: the services restart")
        supervisor.shutdown()
    if not supervisor.is_running():
        end_orphans(services.layout)
        supervisor.launch(clean_environment())
    for name in ("postgresql", *REDIS):
        supervisor.start(name)
    _ready(services, "postgresql", _postgres_answers)
    _ready(services, "redis", _redis_answers)
    _ready(services, "redis-sentinel-1", _master_is_named)
    tell(f"PostgreSQL {services.binaries.postgres_major} on port {state.ports.postgres}, Redis on {state.ports.redis}")
    _application(services, megabytes, tell)


def fill(services: Services, megabytes: int, tell: Tell) -> None:
    """Add data to the application's database, and to an empty Redis."""
    seed.seed(postgres.dsn(services.state), megabytes, progress=tell)
    keys = valkey.fill(services.state)
    tell(f"{megabytes} MB of interviews" + (f" and {keys} keys" if keys else "") + " added")


def end_orphans(layout: Layout) -> None:
    """End the servers of a supervisor that was killed: PostgreSQL by its fast shutdown, then whatever else there is."""
    if process := server_at(layout.postgres_data / "postmaster.pid", layout.postgres_data):
        end([process], seconds=30, how=signal.SIGINT)
    # Valkey writes its title over the mark in its environment.
    servers = (server_at(pid_file, directory) for pid_file, directory in layout.redis_pids.items())
    end([process for process in servers if process], seconds=30)
    end(marked(layout.supervisor), seconds=10)


def _application(services: Services, megabytes: int, tell: Tell) -> None:
    supervisor = services.supervisor
    if services.install_application():
        for name in APPLICATION:
            supervisor.stop(name)
        tell("application installed")
    if not services.provisioned.exists():
        postgres.create_database(services.state)
        backend = services.layout.application / "backend"
        secret = {"OPS_APPLICATION_PASSWORD": services.state.passwords.application}
        run([PYTHON, "-m", "alembic", "upgrade", "head"], cwd=backend, environment=clean_environment())
        run(
            [PYTHON, "-m", "grc_backend.create_user", _MONITOR],
            cwd=backend, environment={**clean_environment(), **secret},
        )  # fmt: skip
        if not _has_interviews(services):  # an interrupted `up` may have begun to add some
            fill(services, megabytes, tell)
        services.provisioned.touch()
    for name in APPLICATION:
        supervisor.start(name)
    _ready(services, "grc-backend", lambda it: _page_answers(f"http://127.0.0.1:{it.state.ports.backend}/health"))
    _ready(services, "grc-frontend", lambda it: _page_answers(f"http://127.0.0.1:{it.state.ports.frontend}/"))
    tell(f"application on port {services.state.ports.backend}, its pages on {services.state.ports.frontend}")


def _has_interviews(services: Services) -> bool:
    with psycopg.connect(postgres.dsn(services.state)) as connection:
        return connection.execute("SELECT FROM public.interview_sessions LIMIT 1").fetchone() is not None


def _ready(services: Services, name: str, answers: Callable[[Services], bool]) -> None:
    try:
        until(lambda: answers(services), what=f"{name}'s first answer", seconds=60)
    except Unreachable as error:
        log = services.layout.logs / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = "\n".join(line[:300] for line in lines[-5:])
        raise OpsError(f"{error.message}; the end of {log}:\n{last}\n", _way_out(services)) from error


def _way_out(services: Services) -> str:
    """What brings back a lab that an interrupted demo or drill left in ruins."""
    name = services.layout.root.name
    return (
        "was the lab left in ruins by a demo that was interrupted? Restore it:\n"
        f'  eval "$({PYTHON} -m lab env --name {name})"\n'
        f"  {PYTHON} -m flows.recovery.full_restore --environment {name} --confirm {name}\n"
        f"or begin anew: {PYTHON} -m lab down --name {name} --remove"
    )


def _postgres_answers(services: Services) -> bool:
    try:
        psycopg.connect(postgres.admin_dsn(services.state), connect_timeout=5).close()
    except psycopg.OperationalError as error:
        raise Unreachable(str(error).strip().splitlines()[-1]) from error
    return True


def _redis_answers(services: Services) -> bool:
    try:
        with redis.Redis.from_url(valkey.url(services.state)) as client:
            return bool(client.ping())
    except redis.RedisError as error:  # also while it loads its file
        raise Unreachable(str(error)) from error


def _master_is_named(services: Services) -> bool:
    """By every Sentinel: the application finds Redis through them."""
    try:
        for port in services.state.ports.sentinels:
            with redis.Redis(port=port, socket_timeout=5) as client:
                client.sentinel_master(valkey.MASTER)
    except redis.RedisError as error:
        raise Unreachable(str(error)) from error
    return True


def _page_answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError as error:
        raise Unreachable(f"{url}: {error}") from error
