"""Rights that a restore by files needs: all that can be known is known before anything is stopped or taken off."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocks.redis.server import Redis
from flows.redis.persistence import backup_redis, restore_redis
from lab.processes import write
from runbook.errors import RunbookFailed
from runbook.report import Report
from tasks.redis.restore.login import judge_login
from tasks.redis.restore.place import Precondition, judge_place
from tasks.redis.topology.refusing_servers import find_refusing_servers
from tasks.redis.topology.topology import read_topology
from tests.redis.conftest import Rig
from tests.redis.servers import NAME, PASSWORD, Group


@pytest.fixture
def as_ops(rig: Rig) -> Iterator[Rig]:
    """The environment logs in as the user ops."""
    plain = rig.toml.read_text()
    write(rig.toml, plain.replace("[redis]\n", '[redis]\nusername = "ops"\n'), 0o644)
    yield rig
    write(rig.toml, plain, 0o644)


def refused(rig: Rig) -> Report:
    run_id = rig.run_id()
    with pytest.raises(RunbookFailed) as raised:
        restore_redis.fn(NAME, confirm=NAME)
    assert rig.run_id() == run_id, "it was stopped"
    assert [path.name for path in rig.data.parent.iterdir()] == [rig.data.name]
    return raised.value.report


def test_a_user_that_is_gone_after_the_start(as_ops: Rig) -> None:
    """It was made at run time and never saved: the restored server could be neither verified nor put back."""
    as_ops.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all"])
    as_ops.client().set("a", 1)
    backup_redis.fn(NAME)
    assert "has no user ops with this password" in refused(as_ops).sentence()


def test_rights_that_are_gone_after_the_start(as_ops: Rig) -> None:
    """The file gives fewer than the running server; each missing one is named."""
    as_ops.configure(aof=True, extra=f'user ops on ">{PASSWORD}" ~* &* +@all -command -replicaof -publish\n')
    as_ops.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all"])
    as_ops.client().set("a", 1)
    backup_redis.fn(NAME)
    told = refused(as_ops).sentence()
    assert "ops may not: COMMAND|LIST" in told
    assert "ACL SETUSER ops +command|list" in told
    (watched,) = judge_login(as_ops.environment.redis, is_watched=True, is_alone=False)
    assert watched.value == "ops may not: COMMAND|LIST, REPLICAOF, PUBLISH"


def test_users_with_which_the_server_would_not_start(rig: Rig) -> None:
    """An ACL file that somebody broke is found by a server that never has the data."""
    rig.client().set("a", 1)
    backup_redis.fn(NAME)
    (rig.data / "users.acl").write_text("user ops on +no-such-command\n")
    rig.configure(aof=True, extra="aclfile users.acl\n")
    assert "the server would not start with them" in refused(rig).sentence()


def test_what_the_sentinels_and_replicas_refuse(group: Group) -> None:
    """Asked of all of them, and nothing is changed by asking."""
    block = group.master.block(sentinels=[one.address for one in group.sentinels], sentinel_master="mymaster")
    around = read_topology(block, group.master.root)
    assert find_refusing_servers(block, around).refusing == ()
    group.sentinels[1].client().acl_setuser(
        "default", enabled=True, nopass=True, commands=["+@all", "-sentinel|monitor"]
    )
    group.replicas[0].client().acl_setuser("default", enabled=True, commands=["+@all", "-config|rewrite"])
    found = find_refusing_servers(block, around)
    (told,) = found.refusing
    assert f"Sentinel {group.sentinels[1].address} forbids this user SENTINEL MONITOR" in told
    assert "+sentinel|monitor" in told
    assert [group.replicas[0].address in one for one in found.forgetting] == [True]
    assert {one.master() for one in group.sentinels} == {group.master.address}


def _as_stranger(work: Callable[[], list[str]]) -> list[str]:
    """What work says in a process that is not root, and not the servers' user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setresuid(54321, 54321, 54321)
            os.write(writing, "\n".join(work()).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        said = told.read().splitlines()
    os.waitpid(child, 0)
    return said


def _wrong(found: Iterator[Precondition]) -> list[str]:
    return [one.value for one in found if not one.ok]


@pytest.fixture
def place() -> Iterator[Path]:
    """Where another user can look: pytest closes its own directories to them."""
    with tempfile.TemporaryDirectory(prefix="ops-rights-", dir="/var/tmp") as name:
        path = Path(name) / "lib"
        (path / "data").mkdir(parents=True)
        for directory in (path.parent, path, path / "data"):
            directory.chmod(0o755)
        yield path


def test_what_the_file_system_refuses(place: Path) -> None:
    """Directory, owner, and a configuration that says replicaof: the server is down, and would follow that."""
    (place / "redis.conf").write_text("replicaof 10.0.0.1 6379\n")
    (place / "redis.conf").chmod(0o644)
    block = Redis(port=1, data_directory=str(place / "data"), config_file=str(place / "redis.conf"), os_user="nobody")
    found = _wrong(judge_place(block, 0, writes_configuration=True))  # also imports what a stranger could not read
    assert found == [] or os.geteuid(), "root may"
    place.chmod(0o555)
    told = _as_stranger(lambda: _wrong(judge_place(block, 0, writes_configuration=True)))
    place.chmod(0o755)
    assert any("lib not writable" in one for one in told)
    assert any("the server runs as nobody" in one for one in told)
    assert any("it has replicaof 10.0.0.1 6379" in one for one in told)
    unknown = block.model_copy(update={"os_user": "no-such-user"})
    assert _wrong(judge_place(unknown, 0, writes_configuration=False)) == ["there is no user no-such-user on this host"]
