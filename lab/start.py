"""Starting the lab's services, in order, and giving a new lab its data."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import redis

from lab.data import seed
from lab.data.checkout import commit_sources
from lab.processes import alive, end, marked, pid_in, run, server_at, working_in, write
from lab.progress import Tell
from lab.servers import postgres, replication, valkey
from lab.servers.nodes import system_of_wal
from lab.servers.replication import RECEIVER_PROGRAM, RECEIVER_SLOT, STANDBY, STANDBY_SLOT
from lab.servers.services import APPLICATION, REDIS, LabServices
from lab.servers.shipping import ARCHIVER_PROGRAM
from lab.state.base import PYTHON
from lab.state.environment import clean_environment
from lab.state.layout import Layout
from runbook.errors import OpsError, Unreachable
from runbook.wait import until

_MONITOR = "monitor"
# src/backend/access/transam/xlogrecovery.c and src/backend/replication/walsender.c
_FORKED = re.compile(
    rb"forked off current database system timeline|is not a child of this server's history|"
    rb"is not in this server's history|does not contain minimum recovery point"
)
_ANSWER_SECONDS, _STREAMING_SECONDS, _SETTLING_SECONDS = 180, 120, 60


def start_services(services: LabServices, megabytes: int, tell: Tell) -> None:
    """Start what does not run; a new lab gets its cluster, its database and `megabytes` of data.

    Raises:
        OpsError: a service does not come up, or the data directory of a lab that had one is gone.
    """
    state, supervisor = services.state, services.supervisor
    primary = services.nodes[0]
    if services.provisioned.exists() and not primary.data.exists():
        raise OpsError(
            f"{primary.data} is gone: a recovery is at work, or it was lost",
            f"recover it with the runbooks, or remove {services.layout.root} to start anew",
        )
    if postgres.create_cluster(primary, state, services.binaries, services.account):
        tell("PostgreSQL cluster created")
    changed = services.configure()
    if changed and supervisor.is_running():
        tell("the configuration is new: the services restart")
        supervisor.shutdown()
    if not supervisor.is_running():
        end_orphans(services.layout)
        supervisor.launch(clean_environment())
    for name in (primary.program, *REDIS):
        supervisor.start(name)
    _ready(services, primary.program, _postgres_answers)
    with ThreadPoolExecutor(max_workers=1) as beside:
        following = _follow(services, beside, tell)
        _ready(services, "redis", _redis_answers)
        _ready(services, "redis-sentinel-1", _master_is_named)
        tell(f"PostgreSQL {services.binaries.postgres_major} on port {primary.port}, Redis on {state.ports.redis}")
        _application(services, megabytes, tell)
        following.result()
    _settle(services)


def _settle(services: LabServices) -> None:
    """Until supervisord believes in what was started, a second after its start; what fails again and again is told by
    its state."""

    def believed() -> bool:
        return not any(service.state == "STARTING" for service in services.supervisor.services().values())

    with contextlib.suppress(Unreachable):
        until(believed, what="supervisord's belief in its programs", seconds=_SETTLING_SECONDS)


def fill(services: LabServices, megabytes: int, tell: Tell) -> None:
    """Add data to the application's database, and to an empty Redis."""
    seed.seed(services.dsn, megabytes, progress=tell)
    keys = valkey.fill(services.state)
    tell(f"{megabytes} MB of interviews" + (f" and {keys} keys" if keys else "") + " added")


def end_orphans(layout: Layout) -> None:
    """End the servers of a supervisor that was killed: PostgreSQL by its fast shutdown, then whatever else there is."""
    nodes = (server_at(data / "postmaster.pid", data) for data in (layout.postgres_data, layout.standby_data))
    end([process for process in nodes if process], seconds=30, how=signal.SIGINT)
    # Valkey writes its title over the mark in its environment.
    servers = (server_at(pid_file, directory) for pid_file, directory in layout.redis_pids.items())
    end([process for process in servers if process], seconds=30)
    end(marked(layout.supervisor), seconds=10)


def lose(layout: Layout) -> None:
    """Kill every process of a region with -9, its supervisor first: nothing starts again. The AI providers are other
    companies', in other places."""
    if supervisor := alive(pid_in(layout.supervisor.with_suffix(".pid"))):
        end([supervisor], seconds=5, how=signal.SIGKILL)
    servers = (server_at(pid_file, directory) for pid_file, directory in layout.redis_pids.items())
    own = [process for process in marked(layout.supervisor) if "ai_providers" not in process.cmdline()]
    end([*own, *(one for one in servers if one)], seconds=10, how=signal.SIGKILL)
    for data in (layout.postgres_data, layout.standby_data):  # PostgreSQL's children write over the mark too
        end(working_in(data), seconds=10, how=signal.SIGKILL)


def _follow(services: LabServices, beside: ThreadPoolExecutor, tell: Tell) -> Future[None]:
    """The receiver of WAL, for which commits wait as long as there is no standby; then the standby, beside the rest.

    What is of another cluster than the primary (a recovery made that anew), or has a timeline of its own (a failover
    left it behind), stays stopped: it would be a second primary, or mix the WAL of two.
    """
    primary = services.nodes[0]
    services.supervisor.start(ARCHIVER_PROGRAM)
    if system_of_wal(services.layout.wal) in (0, primary.system):
        replication.accept(primary, services.state, RECEIVER_SLOT)
        services.supervisor.start(RECEIVER_PROGRAM)
    else:
        tell(f"{RECEIVER_PROGRAM} stays stopped: the WAL in {services.layout.wal} is of another cluster; rejoin it")
    return beside.submit(_join_standby, services, tell)


def _join_standby(services: LabServices, tell: Tell) -> None:
    primary, standby = services.nodes
    if standby.exists and not (standby.follows and standby.system == primary.system):
        tell(f"{standby.program} stays stopped: {standby.data} does not follow the primary; rejoin it")
        return
    replication.accept(primary, services.state, STANDBY_SLOT)
    if not standby.exists:
        replication.create_standby(standby, primary, services.layout, services.binaries, services.account)
        tell("PostgreSQL standby created")
    log = services.layout.logs / f"{standby.program}.log"
    try:
        if _streams(services, log):
            return
        tell(f"{standby.program} is on another timeline than the primary, since a recovery: it is rebuilt")
        services.supervisor.stop(standby.program)
        shutil.rmtree(standby.data)
        replication.create_standby(standby, primary, services.layout, services.binaries, services.account)
        if _streams(services, log):
            return
        tell(f"{standby.program} does not stream; see {log}")
    except Unreachable as error:
        tell(f"{standby.program} does not stream: {error.message}; see {log}")


def _streams(services: LabServices, log: Path) -> bool:
    """Start the standby. False: by its log its timeline has left the primary's, so that it never will stream.

    Raises:
        Unreachable: it does not answer, or does not stream, within the time for it.
    """
    primary, standby = services.nodes
    before = log.stat().st_size if log.exists() else 0

    def forked() -> bool:
        if not log.exists():
            return False
        with log.open("rb") as file:
            file.seek(before)
            return _FORKED.search(file.read()) is not None

    services.supervisor.start(standby.program)
    dsn = postgres.admin_dsn(services.state, standby.port)
    until(lambda: forked() or _answers(dsn), what="the standby's first answer", seconds=_ANSWER_SECONDS)
    if forked():
        return False
    replication.follow(standby, primary, services.layout, services.state)
    until(
        lambda: forked() or STANDBY in replication.streaming(primary, services.state),
        what="the standby's streaming",
        seconds=_STREAMING_SECONDS,
    )
    return not forked()


def _application(services: LabServices, megabytes: int, tell: Tell) -> None:
    supervisor = services.supervisor
    installed = services.install_application()
    if installed:
        for name in APPLICATION:
            supervisor.stop(name)
        tell("application installed")
    commit = commit_sources(services.layout, tell)
    if installed or not services.layout.release.exists():
        write(services.layout.release, f"main {commit}\n", 0o644)
    if not services.provisioned.exists():
        postgres.create_database(services.state, services.nodes[0].port)
        backend = services.layout.application / "backend"
        secret = {"OPS_APPLICATION_PASSWORD": services.state.passwords.application}
        run([PYTHON, "-m", "alembic", "upgrade", "head"], cwd=backend, environment=clean_environment())
        run(
            [PYTHON, "-m", "grc_backend.create_user", _MONITOR],
            cwd=backend,
            environment={**clean_environment(), **secret},
        )
        if not _has_interviews(services):  # an interrupted `up` may have begun to add some
            fill(services, megabytes, tell)
        services.provisioned.touch()
    for name in APPLICATION:
        supervisor.start(name)
    _ready(services, "grc-backend", lambda it: _page_answers(f"http://127.0.0.1:{it.state.ports.backend}/health"))
    _ready(services, "grc-frontend", lambda it: _page_answers(f"http://127.0.0.1:{it.state.ports.frontend}/"))
    tell(f"application on port {services.state.ports.backend}, its pages on {services.state.ports.frontend}")


def _has_interviews(services: LabServices) -> bool:
    with psycopg.connect(services.dsn) as connection:
        return connection.execute("SELECT FROM public.interview_sessions LIMIT 1").fetchone() is not None


def _ready(services: LabServices, name: str, answers: Callable[[LabServices], bool]) -> None:
    try:
        until(lambda: answers(services), what=f"{name}'s first answer", seconds=_ANSWER_SECONDS)
    except Unreachable as error:
        log = services.layout.logs / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = "\n".join(line[:300] for line in lines[-5:])
        raise OpsError(f"{error.message}; the end of {log}:\n{last}\n", _way_out(services)) from error


def _way_out(services: LabServices) -> str:
    """What brings back a lab that an interrupted demo or drill left in ruins."""
    name = services.layout.root.name
    return (
        "was the lab left in ruins by a demo that was interrupted? Restore it:\n"
        f'  eval "$({PYTHON} -m lab env --name {name})"\n'
        f"  {PYTHON} -m flows.recovery.full_restore --environment {name} --confirm {name}\n"
        f"or begin anew: {PYTHON} -m lab down --name {name} --remove"
    )


def _postgres_answers(services: LabServices) -> bool:
    return _answers(services.admin_dsn)


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=5).close()
    except psycopg.OperationalError as error:
        raise Unreachable(str(error).strip().splitlines()[-1]) from error
    return True


def _redis_answers(services: LabServices) -> bool:
    try:
        with redis.Redis.from_url(valkey.url(services.state)) as client:
            return bool(client.ping())
    except redis.RedisError as error:  # also while it loads its file
        raise Unreachable(str(error)) from error


def _master_is_named(services: LabServices) -> bool:
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
