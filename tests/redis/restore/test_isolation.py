"""A restore of a master that has a replica and three Sentinels: taken off before it, put back when it is proven."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from flows.recovery.full_restore import full_restore
from flows.redis.persistence import backup_redis, check_redis_persistence, restore_redis
from flows.redis.restore import replacement
from flows.redis.restore.reattach import reattach_redis
from flows.redis.restore.undo import undo_restore_redis
from lab.processes import write
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.failover.group import read_last_seen
from tasks.redis.restore.survivors import find_survivors
from tasks.redis.restore.swap import start_redis, stop_redis, superseded_redis
from tasks.redis.sentinels import ask_sentinels
from tasks.redis.server import call, setting
from tasks.redis.topology import followers, isolation
from tasks.redis.topology.topology import RECORD, find_record, read_topology
from tests.fixtures.killed import exit_code_at
from tests.fixtures.reports import finding
from tests.fixtures.servers import free_port
from tests.fixtures.stand_in import replace_step
from tests.redis.conftest import Rig
from tests.redis.data import account, fill, survivors
from tests.redis.servers import MASTER, NAME, PASSWORD, PATIENT_MS, RedisServer, SentinelServer, notice_deaths

FIRST_SECONDS = 60.0
"""A busy machine needs a tenth of it. A replica that receives data is given half an hour."""
AUTH = f'masterauth "{PASSWORD}"\nrepl-diskless-sync-delay 0\n'


@dataclass
class Watched:
    """The rig's server as a master, with one replica and three Sentinels."""

    rig: Rig
    replica: RedisServer
    sentinels: list[SentinelServer]

    @property
    def own(self) -> str:
        return f"127.0.0.1:{self.rig.port}"

    @property
    def record(self) -> Path:
        return self.rig.root / "reports" / RECORD

    def masters(self) -> set[str]:
        return {sentinel.master() for sentinel in self.sentinels if sentinel.is_running}

    def agreed(self) -> bool:
        """All Sentinels name one master, and know all the others."""
        for sentinel in self.sentinels:
            state = sentinel.client().sentinel_master(MASTER)
            if (state["num-slaves"], state["num-other-sentinels"]) != (1, 2):
                return False
        return len(self.masters()) == 1

    def streams(self) -> bool:
        """The replica has the master's data, and gets its changes."""
        with contextlib.suppress(redis.RedisError):  # it loads the data
            return bool(self.replica.client().info("replication")["master_link_status"] == "up")
        return False

    def follows(self) -> bool:
        """The rig's server is a replica by now; a role that changes ends its clients' connections."""
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.rig.client().info("replication")["role"] == "slave")
        return False

    def fail_over(self) -> None:
        """The replica becomes the master, as after an incident; the rig's server follows it."""

        def replaced() -> bool:
            if self.sentinels[0].master() == self.own:
                with contextlib.suppress(redis.ResponseError):  # one is under way, or the replica is not good enough
                    self.sentinels[0].client().sentinel_failover(MASTER)
            return self.masters() == {self.replica.address}

        until(replaced, what="the failover", seconds=300)
        until(self.follows, what="the old master", seconds=120)
        until(lambda: "replicaof" in self.rig.configuration.read_text(), what="its configuration", seconds=120)


def stream_of(client: redis.Redis) -> str:
    """The id of a server's replication stream; "": it does not answer."""
    with contextlib.suppress(redis.RedisError):
        return str(client.info("replication")["master_replid"])
    return ""


@pytest.fixture
def watched(rig: Rig) -> Iterator[Watched]:
    """Also as the environment NAME."""
    rig.configure(aof=True, extra=AUTH)
    rig.account.own(rig.configuration)  # CONFIG REWRITE writes beside it, too
    rig.account.own(rig.root)
    rig.services.stop("redis")
    rig.services.start("redis")
    rig.wait()
    replica = RedisServer(settings=(f"replicaof 127.0.0.1 {rig.port}",), executable=rig.program)
    sentinels = [SentinelServer(rig) for _ in range(3)]
    plain = rig.toml.read_text()
    told = f'sentinels = {[s.address for s in sentinels]}\nsentinel_master = "{MASTER}"\n'.replace("'", '"')
    write(rig.toml, plain.replace("[redis]\n", "[redis]\n" + told), 0o644)
    try:
        for server in (replica, *sentinels):
            server.start()
        found = Watched(rig, replica, sentinels)
        until(found.agreed, what="Sentinels that know all", seconds=120)
        until(found.streams, what="the replica's first synchronization", seconds=120)
        yield found
    finally:
        for server in (*sentinels, replica):
            server.remove()
        write(rig.toml, plain, 0o644)
        os.chown(rig.root, os.geteuid(), os.getegid())


def restored(watched: Watched) -> Report:
    report = restore_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    return report


def followed(watched: Watched) -> None:
    """The restored server is the master for everybody, and its replica holds what it holds."""
    assert watched.masters() == {watched.own}
    assert watched.rig.client().info("replication")["role"] == "master"
    info = watched.replica.client().info("replication")
    assert (info["role"], info["master_port"], info["master_link_status"]) == ("slave", watched.rig.port, "up")
    assert account(watched.replica.client()) == account(watched.rig.client())
    assert "replicaof" not in watched.rig.configuration.read_text()
    assert not watched.record.exists()


def test_sentinels_and_replica_are_taken_off_and_put_back(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """No failover happens while the master is stopped, and what was written since the backup comes back from nobody."""
    fill({0: watched.rig.client()})
    before = account(watched.rig.client())
    backup_redis.fn(NAME)
    watched.rig.client().set("garbage", 1)
    planned = restore_redis.fn(NAME)
    assert planned.status is Status.PLANNED
    steps = [step.detail for step in planned.plan_steps if step.step == "detach"]
    assert len(steps) == 2
    assert watched.replica.address in steps[1]
    assert watched.masters() == {watched.own}, "a plan changes nothing"
    caplog.set_level(logging.INFO, logger="ops")
    restored(watched)
    done = [one.getMessage().partition(": done in ")[0] for one in caplog.records if ": done in " in one.getMessage()]
    lines = [one for one in done if one.startswith("Step ")]
    number = len(planned.plan_steps)
    assert lines == [f"Step {n}/{number}: {one.step}" for n, one in enumerate(planned.plan_steps, 1)]
    followed(watched)
    assert account(watched.rig.client()) == survivors(before)
    until(watched.agreed, what="Sentinels that know all", seconds=120)
    for sentinel in watched.sentinels:
        state = sentinel.client().sentinel_master(MASTER)
        assert (state["config-epoch"], state["down-after-milliseconds"], state["failover-timeout"]) == (
            0,
            PATIENT_MS,
            PATIENT_MS,
        )
    watched.rig.services.stop("redis")
    notice_deaths(watched.sentinels)
    until(lambda: watched.masters() == {watched.replica.address}, what="a failover that works again", seconds=300)


def test_the_replica_of_a_restarted_master_has_its_data(watched: Watched) -> None:
    """A restart begins another replication stream, and a Sentinel asks only every 10 s: it knows the earlier one."""
    rig, env = watched.rig, watched.rig.environment
    fill({0: rig.client()})

    def restarted_unnoticed() -> bool:
        info = rig.client().info()
        os.kill(int(info["process_id"]), signal.SIGKILL)
        until(lambda: stream_of(rig.client()) not in ("", info["master_replid"]), what="the restart", seconds=120)
        until(follows, what="the replica of the restarted master", seconds=120)
        seen = read_last_seen(env.redis, ask_sentinels(env.redis))
        return bool(seen and seen.replid != stream_of(rig.client()))

    def follows() -> bool:
        return watched.streams() and stream_of(watched.replica.client()) == stream_of(rig.client())

    until(restarted_unnoticed, what="a restart that no Sentinel has noticed", seconds=120)
    found = find_survivors(env.redis, read_topology(env.redis, env.reports_directory), rig.store, env.reports_directory)
    assert [(copy.name, copy.problem) for copy in found.copies][:1] == [(f"replica {watched.replica.address}", "")]


@pytest.mark.parametrize("denies", [True, False], ids=["denied", "taken"])
def test_a_script_of_a_sentinel_is_put_back_or_told(watched: Watched, denies: bool) -> None:
    """It is forgotten with the master; a Sentinel takes it from its configuration file only, unless that says else."""
    sentinel, script = watched.sentinels[0], "/bin/true"
    sentinel.stop()
    more = (
        f"sentinel notification-script {MASTER} {script}\nsentinel deny-scripts-reconfig {'yes' if denies else 'no'}\n"
    )
    sentinel.configuration.write_text(sentinel.configuration.read_text() + more)
    sentinel.start()
    until(watched.agreed, what="Sentinels that know all", seconds=120)
    backup_redis.fn(NAME)
    report = restore_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.WARN, "a script is at stake"
    told = [one.hint for one in report.findings if "has lost its notification-script" in one.hint]
    now = sentinel.client().sentinel_master(MASTER).get("notification-script")
    assert (len(told), now) == ((1, None) if denies else (0, script))


def test_a_replica_that_cannot_write_its_configuration_is_told(watched: Watched) -> None:
    """Started again it would not follow: nobody would know before."""
    backup_redis.fn(NAME)
    watched.replica.root.chmod(0o555)  # a rewritten file takes the old one's place
    try:
        report = restore_redis.fn(NAME, confirm=NAME)
    finally:
        watched.replica.root.chmod(0o755)
    told = [one.hint for one in report.findings if "cannot write its configuration file" in one.hint]
    assert [watched.replica.address in one for one in told] == [True]
    assert report.status is Status.WARN


@pytest.mark.parametrize("alive", [True, False], ids=["replica", "down"])
def test_after_a_failover_the_restored_server_is_the_master_again(watched: Watched, alive: bool) -> None:
    """This host's server follows another by then, or is down with a configuration that says so: neither wins."""
    fill({0: watched.rig.client()})
    before = account(watched.rig.client())
    backup_redis.fn(NAME)
    watched.fail_over()
    watched.replica.client().set("garbage", 1)
    if not alive:
        watched.rig.services.stop("redis")
    restored(watched)
    followed(watched)
    assert account(watched.rig.client()) == survivors(before)


def test_after_a_failover_the_new_master_is_backed_up(watched: Watched) -> None:
    """Not this host's server, which is a replica by then: over the network."""
    watched.rig.client().set("old", 1)
    watched.fail_over()
    watched.replica.client().set("newer", 1)
    report = backup_redis.fn(NAME)
    assert report.facts["server"] == watched.replica.address
    watched.replica.client().flushall()
    restored(watched)
    assert watched.rig.client().mget("old", "newer") == [b"1", b"1"]


# One of each kind of boundary: before, between and after the renames. The soak takes them all.
BOUNDARIES = ("redis: sentinels removed", "redis: between renames", "redis: replicas follow")
OTHERS = ("redis: detachment recorded", "redis: replicas isolated", "redis: after second rename")


@pytest.mark.parametrize("points", [BOUNDARIES, pytest.param(OTHERS, marks=pytest.mark.soak)], ids=["some", "others"])
def test_killed_anywhere(watched: Watched, points: tuple[str, ...]) -> None:
    """kill -9 while Sentinels and replica are off: launched again, all of them are back."""
    fill({0: watched.rig.client()})
    before = account(watched.rig.client())
    backup_redis.fn(NAME)
    for point in points:
        assert _killed(point) == -signal.SIGKILL, point
        assert find_record(watched.rig.root / "reports"), point
        restored(watched)
        followed(watched)
        assert account(watched.rig.client()) == survivors(before), point


def test_what_was_not_put_back_is_put_back_without_another_restore(watched: Watched) -> None:
    """Killed when the data was in place: what clients wrote since stays."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    assert reattach_redis.fn(NAME, confirm=NAME).outcome.startswith("nothing was detached")
    assert _killed("redis: replicas follow") == -signal.SIGKILL
    watched.rig.client().set("since", 1)
    assert watched.masters() == {""}
    planned = reattach_redis.fn(NAME)
    assert planned.status is Status.PLANNED
    assert [step.step for step in planned.plan_steps] == ["follow", "watch", "watch", "watch"]
    report = reattach_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    followed(watched)
    assert watched.rig.client().get("since") == b"1"


def _killed(point: str) -> int:
    return exit_code_at(point, lambda: restore_redis.fn(NAME, confirm=NAME))


def test_a_restore_that_fails_puts_back_what_it_took_off(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The swap fails: the old data is served again, the replica follows, the Sentinels watch."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    watched.rig.client().set("newer", 1)

    def fails(*_: object) -> None:
        raise OpsError("the disk is on fire")

    replace_step(monkeypatch, replacement, "swap_redis", fails)
    with pytest.raises(OpsError, match="on fire"):
        restore_redis.fn(NAME, confirm=NAME)
    followed(watched)
    assert watched.rig.client().get("newer") == b"1"


@pytest.mark.parametrize("what", ["does not stop", "is gone"])
def test_an_undo_that_fails_puts_back_what_it_took_off(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    watched.rig.client().set("newer", 1)
    restored(watched)
    aside = superseded_redis(watched.rig.environment.redis)[0]
    real = stop_redis.after

    def after(*waited: object) -> Callable[..., object]:
        def stop(*given: Any) -> object:
            if what == "does not stop":
                raise OpsError("Redis did not stop")
            stopped = real(*waited)(*given)
            shutil.rmtree(aside)
            return stopped

        return stop

    monkeypatch.setattr("flows.redis.restore.undo.stop_redis.after", after, raising=False)
    with pytest.raises(OpsError, match="did not stop|cannot be renamed"):
        undo_restore_redis.fn(NAME, confirm=NAME)
    followed(watched)
    assert watched.rig.client().mget("old", "newer") == [b"1", None]


def test_a_replica_that_refuses_stops_nothing(watched: Watched) -> None:
    """Its user may not give REPLICAOF: that is known before anything is taken off."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    run_id = watched.rig.run_id()
    watched.replica.client().acl_setuser("default", enabled=True, commands=["+@all", "-replicaof"])
    with pytest.raises(RunbookFailed, match=f"{watched.replica.address}.*replicaof"):
        restore_redis.fn(NAME, confirm=NAME)
    assert watched.rig.run_id() == run_id
    followed(watched)


def test_a_restore_whose_taking_off_fails_puts_back(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica goes away, and the Sentinels have forgotten the master by then."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    real = isolation.failpoint

    def fails(name: str) -> None:
        real(name)
        if name == "redis: sentinels removed":
            raise OpsError("the replica refuses")

    monkeypatch.setattr(isolation, "failpoint", fails)
    with pytest.raises(OpsError, match="the replica refuses"):
        restore_redis.fn(NAME, confirm=NAME)
    followed(watched)


def test_sentinels_that_are_not_listed_stop_the_restore(watched: Watched) -> None:
    """The others would fail over the master that the listed one has forgotten."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    listed = str([s.address for s in watched.sentinels]).replace("'", '"')
    text = watched.rig.toml.read_text().replace(listed, f'["{watched.sentinels[0].address}"]')
    write(watched.rig.toml, text, 0o644)
    with pytest.raises(RunbookFailed, match=r"knows 3 Sentinels including itself; \[redis\] sentinels has 1"):
        restore_redis.fn(NAME, confirm=NAME)
    followed(watched)


def test_sentinels_that_announce_host_names(watched: Watched) -> None:
    """`localhost`, where the environment says 127.0.0.1: it is this server, and no replica of itself."""
    watched.rig.client().set("old", 1)
    for sentinel in watched.sentinels:
        sentinel.stop()
        known = ("sentinel known", "sentinel config-epoch", "sentinel leader", "sentinel current", "sentinel myid")
        kept = [line for line in sentinel.configuration.read_text().splitlines() if not line.startswith(known)]
        text = "\n".join(kept).replace(f"127.0.0.1 {watched.rig.port}", f"localhost {watched.rig.port}") + "\n"
        named = "sentinel resolve-hostnames yes\nsentinel announce-hostnames yes\n"
        write(sentinel.configuration, named + text, 0o644, sentinel.account)
        sentinel.start()
    until(watched.agreed, what="Sentinels that know all", seconds=120)
    assert watched.masters() == {f"localhost:{watched.rig.port}"}
    backup_redis.fn(NAME)
    watched.rig.client().set("garbage", 1)
    restored(watched)
    assert watched.masters() == {f"localhost:{watched.rig.port}"}
    assert watched.rig.client().info("replication")["role"] == "master"
    assert watched.replica.client().keys() == [b"old"]


def test_killed_before_the_swap_was_noted(watched: Watched) -> None:
    """The restored server is the master for all, not the one from before with the bad data."""
    watched.rig.client().set("good", 1)
    backup_redis.fn(NAME)
    watched.fail_over()
    watched.replica.client().set("garbage", 1)
    assert _killed("after swap_redis") == -signal.SIGKILL
    watched.rig.services.start("redis")
    watched.rig.wait()
    report = reattach_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    followed(watched)
    assert watched.rig.client().keys() == [b"good"]


def test_what_the_master_of_now_held_is_kept(watched: Watched) -> None:
    """It was promoted while this host's server was down: what was written to it since is in no directory here."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    watched.fail_over()
    watched.rig.services.stop("redis")
    watched.replica.client().set("newer", 1)
    assert "keep" in [step.step for step in restore_redis.fn(NAME).plan_steps]
    report = restored(watched)
    assert watched.rig.client().exists("newer") == 0
    name = str(report.facts["live data kept as"])
    assert f"restore-redis with backup={name}" in str(report.facts["undo"])
    assert restore_redis.fn(NAME, name, confirm=NAME).status is Status.OK
    followed(watched)
    assert watched.rig.client().mget("old", "newer") == [b"1", b"1"]


def test_what_the_master_of_now_held_is_kept_from_other_files(watched: Watched) -> None:
    """The same where this host's files are restored, which are older."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    watched.fail_over()
    watched.rig.services.stop("redis")
    watched.replica.client().set("newer", 1)
    report = restore_redis.fn(NAME, redis_source="files", confirm=NAME)
    assert watched.rig.client().mget("old", "newer") == [b"1", None]
    found = str(report.facts["undo"])
    assert f"for the data of {watched.replica.address}: restore-redis with backup=" in found
    assert restore_redis.fn(NAME, found.rpartition("=")[2], confirm=NAME).status is Status.OK
    assert watched.rig.client().mget("old", "newer") == [b"1", b"1"]


@pytest.mark.parametrize("what", ["replica", "sentinel"])
def test_one_that_dies_does_not_keep_the_rest_off(watched: Watched, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """While it is taken off: all others are put back, and reattach-redis does the rest when it is back."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    dies = watched.replica if what == "replica" else watched.sentinels[0]
    real = start_redis.after

    def after(*waited: object) -> Callable[..., object]:
        dies.crash()
        return real(*waited)

    monkeypatch.setattr("flows.redis.restore.replacement.start_redis.after", after, raising=False)
    report = restore_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.WARN, report.sentence()
    assert dies.address in report.sentence()
    assert watched.masters() == {watched.own}
    dies.start()
    assert reattach_redis.fn(NAME, confirm=NAME).status is Status.OK
    followed(watched)
    until(watched.agreed, what="Sentinels that know all", seconds=120)


def test_a_server_that_may_still_be_written_to_stops_the_restore(watched: Watched) -> None:
    """The replica does not answer here, and no Sentinel holds it for dead."""
    watched.rig.client().set("a", 1)
    backup_redis.fn(NAME)
    for sentinel in watched.sentinels:
        sentinel.remove()
    gone = f"127.0.0.1:{free_port()}"
    text = watched.rig.toml.read_text().replace("[redis]\n", f'[redis]\nreplicas = ["{gone}"]\n')
    write(watched.rig.toml, text, 0o644)
    run_id = watched.rig.run_id()
    with pytest.raises(RunbookFailed, match=f"{gone} cannot be reached"):
        restore_redis.fn(NAME, confirm=NAME)
    assert watched.rig.run_id() == run_id


def test_a_sentinel_that_is_away_is_a_warning(watched: Watched) -> None:
    watched.rig.client().set("a", 1)
    backup_redis.fn(NAME)
    watched.sentinels[2].crash()
    report = restore_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.WARN
    assert watched.sentinels[2].address in report.sentence()
    assert watched.masters() == {watched.own}


def test_a_record_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(OpsError, match="register the Sentinels by hand"):
        find_record(tmp_path)
    assert not isinstance(find_record(tmp_path / "none"), Unreachable)


def test_a_replica_that_cannot_log_in_keeps_nobody_from_redis(watched: Watched) -> None:
    """A wrong masterauth: the Sentinels name the master, and the report names the replica. It is attached later."""
    rig, replica = watched.rig, watched.replica
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    replica.client().config_set("masterauth", "wrong")
    rig.crash()
    shutil.rmtree(rig.data)
    report = full_restore.fn(NAME, redis_source="backup", confirm=NAME)
    assert report.status is Status.WARN
    assert report.seconds < FIRST_SECONDS
    assert watched.masters() == {watched.own}
    assert rig.client().get("old") == b"1"
    told = finding(report, "not reattached")
    assert told.hint.startswith(f"{replica.address} is not in sync with {watched.own}: {watched.own} refuses its login")
    assert setting(replica.client(), "replica-priority") == "0"
    assert "detached by a restore" in finding(check_redis_persistence.fn(NAME), f"replica {replica.address}").value
    served = full_restore.fn(NAME)
    assert served.outcome.startswith("nothing to restore"), "the master serves, though the replica is not attached"
    assert reattach_redis.fn(NAME, confirm=NAME).status is Status.WARN, "it still cannot log in"
    replica.client().config_set("masterauth", PASSWORD)
    assert reattach_redis.fn(NAME, confirm=NAME).status is Status.OK
    followed(watched)
    assert setting(replica.client(), "replica-priority") == "100"


def test_a_replica_without_the_restored_data_is_not_promoted(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the new master's data, with the replaced data in its memory, when that master dies."""
    rig, replica = watched.rig, watched.replica
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    rig.client().set("garbage", 1)
    rig.configure(aof=True, extra=AUTH.replace("sync-delay 0", "sync-delay 600"))
    monkeypatch.setattr(followers, "SYNC_SECONDS", 3.0)
    for sentinel in watched.sentinels:
        call(sentinel.client(), "SENTINEL", "DEBUG", "INFO-PERIOD", 300)
    report = restore_redis.fn(NAME, confirm=NAME)
    assert "is not in sync after" in finding(report, "not reattached").hint
    until(lambda: all(knows(one, replica) for one in watched.sentinels), what="Sentinels that know it", seconds=60)
    rig.services.stop("redis")
    notice_deaths(watched.sentinels)
    until(lambda: any("no-good-slave" in one.log_tail() for one in watched.sentinels), what="a failover", seconds=120)
    assert watched.masters() == {watched.own}
    assert replica.client().get("garbage") == b"1", "it has the replaced data"


def knows(sentinel: SentinelServer, replica: RedisServer) -> bool:
    """Whether it has asked the replica, without which it promotes nobody."""
    found = sentinel.client().sentinel_slaves(MASTER)
    return any(one["port"] == replica.port and one["info-refresh"] < PATIENT_MS for one in found)


def test_a_full_restore_keeps_the_data_of_the_master_of_now(watched: Watched) -> None:
    """It was promoted while this host's server was down: no directory here has what was written to it since."""
    watched.rig.client().set("old", 1)
    backup_redis.fn(NAME)
    backup = next(path.parent.name for path in watched.rig.store.glob("*/manifest.json"))
    watched.fail_over()
    watched.rig.services.stop("redis")
    watched.replica.client().set("newer", 1)
    report = full_restore.fn(NAME, backup=backup, confirm=NAME)
    followed(watched)
    assert watched.replica.client().get("newer") is None
    kept = report.facts[f"undo for the data of {watched.replica.address}"].removeprefix("restore-redis with backup=")
    assert restore_redis.fn(NAME, backup=kept, confirm=NAME).status in (Status.OK, Status.WARN)
    assert watched.rig.client().mget("old", "newer") == [b"1", b"1"]


def test_an_undo_keeps_the_data_of_the_master_of_now(watched: Watched) -> None:
    """A failover came after the restore, and this host's server is down: the undo replaces the new master's data."""
    rig = watched.rig
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    restored(watched)
    watched.fail_over()
    rig.services.stop("redis")
    watched.replica.client().set("newer", 1)
    report = undo_restore_redis.fn(NAME, confirm=NAME)
    followed(watched)
    assert rig.client().get("newer") is None
    assert restore_redis.fn(NAME, backup=report.facts["live data kept as"], confirm=NAME).status is Status.OK
    assert rig.client().mget("old", "newer") == [b"1", b"1"]
