"""Real faults of a host, each as a context manager that undoes itself; several can be open at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import psycopg
import pytest

from flows.launch import checked, find_flow
from flows.troubleshooting import database
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.greeting import read_answer
from tests.fixtures.servers import ROLE, PostgresServer, free_port
from tests.redis.servers import running_redis
from tests.troubleshooting.conftest import NAME, PLACES, Host, cause
from tests.troubleshooting.test_database import STANDBY, sessions
from tests.troubleshooting.test_redis import configured


class Faults:
    """Faults of one host; `describe` collects what its environment says otherwise than usual."""

    def __init__(self, host: Host, directory: Path, request: pytest.FixtureRequest) -> None:
        self.host, self.directory = host, directory
        self.monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        self.other_server: Callable[[], PostgresServer] = lambda: request.getfixturevalue("postgres_server")
        self.described: dict[str, object] = {}

    def describe(self, **values: object) -> None:
        self.described |= values
        self.host.describe(self.directory, **self.described)

    def open(self, stack: contextlib.ExitStack, *names: str) -> None:
        """Seed the faults, in this order."""
        for name in names:
            seed: Callable[[], AbstractContextManager[object]] = getattr(self, name)
            stack.enter_context(seed())

    def diagnose(
        self, diagnosed: Callable[[], Report], seeds: tuple[str, ...], first: str, second: str, hint: str
    ) -> Report:
        """Seed the faults and diagnose: the first finding is `first` with its `hint`, `second` comes next."""
        with contextlib.ExitStack() as stack:
            self.open(stack, *seeds)
            report = diagnosed()
        assert_order(report, first, second)
        assert hint in report.findings[0].hint
        return report

    # Any service

    @contextlib.contextmanager
    def halted(self, role: str) -> Iterator[None]:
        """SIGSTOP."""
        pid = self.host.services.state(role).pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def killed(self, role: str) -> Iterator[None]:
        """kill -9: the service manager starts it again, and it is healthy. Afterwards it is restarted in order, so
        that it does not look as if it had crashed."""
        pid = self.host.services.state(role).pid
        psutil.Process(pid).kill()
        until(lambda: self.host.services.state(role).pid not in (0, pid), what="its restart", seconds=120)
        self.host.wait()
        yield
        self.host.services.restart(role)
        self.host.wait()

    # PostgreSQL

    def postgres_dead(self) -> AbstractContextManager[object]:
        return self.host.stopped("postgres")

    def postgres_halted(self) -> AbstractContextManager[object]:
        return self.halted("postgres")

    def postgres_killed(self) -> AbstractContextManager[object]:
        return self.killed("postgres")

    def full(self) -> AbstractContextManager[object]:
        """All connections but those that are reserved for superusers."""
        return sessions(self.host, PLACES - 3)

    @contextlib.contextmanager
    def blind(self) -> Iterator[None]:
        """All of them."""
        with sessions(self.host, PLACES - 3), contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(self.host.server.connect())
            yield

    @contextlib.contextmanager
    def full_of_idle_transactions(self) -> Iterator[None]:
        with sessions(self.host, PLACES - 3) as opened:
            for one in opened:
                one.execute("SELECT 1")
            yield

    @contextlib.contextmanager
    def idle_transactions(self) -> Iterator[None]:
        with sessions(self.host, 6) as opened:
            for one in opened:
                one.execute("SELECT 1")
            yield

    @contextlib.contextmanager
    def locked(self, waiting: int = 2, by: str = ROLE, statement: str = "") -> Iterator[int]:
        """So many sessions wait for a table, which a session holds that is idle in a transaction, or busy with a
        statement. Yields its process id."""
        self.host.server.sql("CREATE TABLE IF NOT EXISTS piled (id int)", database="grc_db", user=ROLE)
        with sessions(self.host, waiting) as rest, contextlib.closing(self.host.server.connect("grc_db", by)) as holder:
            holder.autocommit = False
            holder.execute("LOCK TABLE piled IN ACCESS EXCLUSIVE MODE")
            threads = [threading.Thread(target=_use, args=(one,)) for one in rest]
            if statement:
                threads.append(threading.Thread(target=_work, args=(holder, statement)))
            for thread in threads:
                thread.start()
            until(lambda: self._waiting() == waiting, what="sessions that wait", seconds=120)
            try:
                yield holder.info.backend_pid
            finally:
                with contextlib.suppress(psycopg.Error):
                    holder.cancel_safe() if statement else holder.rollback()
                for thread in threads:
                    thread.join(120)

    def one_locked(self) -> AbstractContextManager[object]:
        return self.locked(1)

    def full_behind_a_lock(self) -> AbstractContextManager[object]:
        return self.locked(PLACES - 4)

    @contextlib.contextmanager
    def locked_by_a_prepared_transaction(self) -> Iterator[None]:
        self.host.server.sql("CREATE TABLE IF NOT EXISTS piled (id int)", database="grc_db", user=ROLE)
        with sessions(self.host, 2) as (holder, waiting):
            holder.execute("LOCK TABLE piled IN ACCESS EXCLUSIVE MODE")
            holder.execute("PREPARE TRANSACTION 'forgotten-4717'")
            thread = threading.Thread(target=_use, args=(waiting,))
            thread.start()
            until(lambda: self._waiting() == 1, what="a session that waits", seconds=120)
            try:
                yield
            finally:
                self.host.server.sql("ROLLBACK PREPARED 'forgotten-4717'", database="grc_db")
                thread.join(120)

    def _waiting(self) -> object:
        longer = "clock_timestamp() > state_change + interval '0.2 s'"
        try:
            return self.host.server.sql(
                f"SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND {longer}"
            )[0][0]
        except psycopg.OperationalError:  # every place is taken for a moment
            return -1

    @contextlib.contextmanager
    def stale_password(self) -> Iterator[None]:
        """The application's own file has an old one."""
        self.describe(env_file=self.host.write_env("stale-word-77"))
        yield

    @contextlib.contextmanager
    def password_of_the_runbooks(self) -> Iterator[None]:
        """The environment has an old one, the application itself the right one."""
        self.describe(env_file=self.host.write_env())
        with self.monkeypatch.context() as patch:
            patch.setenv("SICK_PASSWORD", "stale-word-79")
            yield

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        self.host.server.sql(f"ALTER ROLE {ROLE} SET default_transaction_read_only = on")
        try:
            yield
        finally:
            self.host.server.sql(f"ALTER ROLE {ROLE} RESET default_transaction_read_only")

    @contextlib.contextmanager
    def role_limit(self) -> Iterator[None]:
        """As many as `idle_transactions` opens."""
        self.host.server.sql(f"ALTER ROLE {ROLE} CONNECTION LIMIT 6")
        try:
            yield
        finally:
            self.host.server.sql(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Less is free than a server needs; full_disk.py fills a real one."""
        with self.monkeypatch.context() as patch:
            patch.setattr(database, "LEAST_BYTES", 1 << 62)
            yield

    @contextlib.contextmanager
    def nearly_full_disk(self) -> Iterator[None]:
        self.describe(limits='"host.disk.used_ratio" = [0, 0]')
        yield

    @contextlib.contextmanager
    def failing_archiver(self) -> Iterator[None]:
        with self._configured("archive_command", "false"):
            self._switch_wal()
            failed = "SELECT failed_count > 0 FROM pg_stat_archiver"
            until(lambda: self.host.server.sql(failed)[0][0], what="a failed command", seconds=120)
            yield
        self.host.server.sql("SELECT pg_stat_reset_shared('archiver')")

    @contextlib.contextmanager
    def lost_slot(self) -> Iterator[None]:
        sql = self.host.server.sql
        with self._configured("max_slot_wal_keep_size", "1MB"):
            sql("SELECT pg_create_physical_replication_slot('gone_4717', true)")
            try:
                until(self._is_lost, what="the loss of its WAL", seconds=120)
                yield
            finally:
                sql("SELECT pg_drop_replication_slot('gone_4717')")

    def _is_lost(self) -> object:
        self._switch_wal()
        self.host.server.sql("CHECKPOINT")
        return self.host.server.sql("SELECT wal_status = 'lost' FROM pg_replication_slots")[0][0]

    def _switch_wal(self) -> None:
        self.host.server.sql("SELECT pg_logical_emit_message(false, 'test', '')")
        self.host.server.sql("SELECT pg_switch_wal()")

    @contextlib.contextmanager
    def _configured(self, name: str, value: str) -> Iterator[None]:
        self.host.server.sql(f"ALTER SYSTEM SET {name} = '{value}'")
        self.host.server.sql("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            self.host.server.sql(f"ALTER SYSTEM RESET {name}")
            self.host.server.sql("SELECT pg_reload_conf()")

    @contextlib.contextmanager
    def two_primaries(self) -> Iterator[None]:
        """The environment's standby takes writes."""
        self.describe(more=STANDBY.format(port=self.other_server().port))
        yield

    @contextlib.contextmanager
    def standby_dead(self) -> Iterator[None]:
        self.describe(more=STANDBY.format(port=free_port()))
        yield

    @contextlib.contextmanager
    def backend_process_killed(self) -> Iterator[None]:
        """kill -9 of a process of one session: the server ends all others, and recovers."""
        with contextlib.closing(self.host.server.connect()) as session:
            psutil.Process(session.info.backend_pid).kill()
        log = self.host.root / "postgresql.log"
        until(lambda: "reinitializing" in log.read_text(), what="the end of all sessions", seconds=120)
        self.host.wait()
        yield
        self.host.services.restart("postgres")
        self.host.wait()

    # Redis

    def redis_dead(self) -> AbstractContextManager[object]:
        return self.host.stopped("redis")

    def redis_halted(self) -> AbstractContextManager[object]:
        return self.halted("redis")

    def redis_killed(self) -> AbstractContextManager[object]:
        return self.killed("redis")

    @contextlib.contextmanager
    def redis_password(self) -> Iterator[None]:
        with self.monkeypatch.context() as patch:
            patch.setenv("SICK_REDIS_PASSWORD", "stale-word-78")
            yield

    @contextlib.contextmanager
    def maxclients(self) -> Iterator[None]:
        client = self.host.redis.client()
        with contextlib.ExitStack() as stack:
            stack.callback(client.config_resetstat)
            stack.enter_context(configured(self.host, maxclients="20"))
            for _ in range(30):
                other = self.host.redis.client()
                stack.callback(other.close)
                with contextlib.suppress(Exception):
                    other.ping()
            yield

    def memory(self) -> AbstractContextManager[object]:
        return configured(self.host, **{"maxmemory-policy": "noeviction", "maxmemory": "1"})

    @contextlib.contextmanager
    def failed_save(self) -> Iterator[None]:
        client, file = self.host.redis.client(), self.host.redis.data / "dump.rdb"
        file.unlink(missing_ok=True)
        with configured(self.host, save="3600 1"):
            file.mkdir()  # nothing can be renamed to it
            client.bgsave()
            until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", what="it", seconds=120)
            yield
            file.rmdir()
            client.save()
        file.unlink()

    @contextlib.contextmanager
    def two_masters(self) -> Iterator[None]:
        """The environment's replica takes writes."""
        with running_redis() as other:
            self.describe(redis_more=f'replicas = ["127.0.0.1:{other.port}"]')
            yield

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """It reads its own file, slowly."""
        client, block = self.host.redis.client(), self.host.redis.block()
        client.mset({f"slow:{number}": "x" * 2000 for number in range(1000)})
        slowly = {"key-load-delay": "50000", "loading-process-events-interval-bytes": "1024", "rdbcompression": "no"}
        with configured(self.host, **slowly), contextlib.closing(self.host.redis.client()) as other:
            reload = threading.Thread(target=other.execute_command, args=("DEBUG", "RELOAD"))
            reload.start()
            until(lambda: read_answer.work(block).state == "loading", what="its loading", seconds=120)
            try:
                yield
            finally:
                client.config_set("key-load-delay", "0")  # it has loaded for long enough
                reload.join(120)
        client.flushdb()
        (self.host.redis.data / "dump.rdb").unlink()  # the next start would load it

    def too_few_replicas(self) -> AbstractContextManager[object]:
        return configured(self.host, **{"min-replicas-to-write": "1"})

    @contextlib.contextmanager
    def replica_dead(self) -> Iterator[None]:
        self.describe(redis_more=f'replicas = ["127.0.0.1:{free_port()}"]')
        yield

    @contextlib.contextmanager
    def of_another_master(self) -> Iterator[None]:
        client = self.host.redis.client()
        client.replicaof("127.0.0.1", str(free_port()))
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")

    @contextlib.contextmanager
    def busy_script(self) -> Iterator[None]:
        """A script that does not end, which everybody waits for."""
        client, other = self.host.redis.client(), self.host.redis.client()
        with configured(self.host, **{"busy-reply-threshold": "10"}):
            script = threading.Thread(target=_run_forever, args=(other,))
            script.start()
            until(lambda: _answer(client).startswith("BUSY"), what="its being busy", seconds=120)
            yield
            client.execute_command("SCRIPT", "KILL")
            script.join(120)


def _use(session: psycopg.Connection[tuple[object, ...]]) -> None:
    with contextlib.suppress(psycopg.Error):
        session.execute("SELECT count(*) FROM piled")
        session.rollback()


def _work(session: psycopg.Connection[tuple[object, ...]], statement: str) -> None:
    with contextlib.suppress(psycopg.Error):
        session.execute(statement)  # type: ignore[call-overload]
    session.rollback()


def _run_forever(client: object) -> None:
    with contextlib.suppress(Exception):  # that it was ended
        client.execute_command("EVAL", "while true do end", "0")  # type: ignore[attr-defined]


def _answer(client: object) -> str:
    try:
        return str(client.ping())  # type: ignore[attr-defined]
    except Exception as error:
        return str(error)


def assert_order(report: Report, first: str, second: str = "") -> None:
    """The first finding is the true cause, the worst of all, and the first on the page; `second` comes next."""
    assert first in cause(report), report.findings[0]
    serious = [one for one in report.findings if one.name in ("likely cause", "also found")]
    assert report.findings[0].status is max((one.status for one in serious), key=list(Status).index)
    assert not second or second in serious[1].value, serious[1]


def carry_out(report: Report, **instead: object) -> Report:
    """Run the first runbook that the likely cause links, with the values of its form, confirmed. `instead`: values
    that no form allows, for what a person would wait for."""
    wanted = report.findings[0].follow[0]
    flow = find_flow(wanted.flow)
    done: Report = flow.fn(**{**checked(flow, {"environment": NAME, **wanted.parameters, "confirm": NAME}), **instead})
    return done
