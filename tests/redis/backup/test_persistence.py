"""Backup and restore of a real server, as an operator launches them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore.gate import loss_of
from flows.redis.restore.methods import replacing
from runbook.change import carrying_out
from runbook.errors import RunbookFailed
from runbook.guard.effect import Effect
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue, codec, manifest
from tasks.redis.content.manifest import EXPIRING
from tasks.redis.restore.swap import superseded_redis
from tasks.redis.server import family, program_version
from tasks.stores.directory import DirectoryStore
from tests.redis.conftest import NAME, PASSWORD, Rig
from tests.redis.data import account, add_short_for, fill, survivors

DATABASES = (0, 3, 11)


def backup() -> str:
    report = backup_redis.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    return report.facts["backup"]


def restore(wanted: str = "latest", confirm: str = NAME) -> Report:
    return restore_redis.fn(NAME, wanted, confirm=confirm)


def refused(wanted: str = "latest") -> str:
    with pytest.raises(RunbookFailed) as failure:
        restore(wanted)
    return failure.value.report.sentence()


@pytest.mark.parametrize("rig", [True, False], indirect=True, ids=["aof", "rdb"])
def test_round_trip(rig: Rig) -> None:
    """What comes back is what was there, but for what expired since and what is dropped; the old AOF does not win."""
    clients = {n: rig.client(n) for n in DATABASES}
    fill(clients)
    before = {n: account(client) for n, client in clients.items()}
    ends = add_short_for(clients, backup)
    for n in DATABASES:
        rig.client(n).flushdb()
        rig.client(n).set("garbage", n)
    planned = restore_redis.fn(NAME)
    assert planned.status is Status.PLANNED
    assert len(planned.plan_steps) == 5
    assert rig.client().get("garbage") == b"0", "a plan changes nothing"
    until(lambda: time.time() > ends, what="the end of the short keys", seconds=200)
    report = restore()
    assert report.status is Status.OK, report.sentence()
    for n in DATABASES:
        assert account(rig.client(n)) == survivors(before[n])
    assert int(report.facts["Redis keys expired since the backup"]) == 100 * len(DATABASES)
    assert rig.client().function_list()
    kept = superseded_redis(rig.environment.redis)
    assert [str(path) for path in kept] == [report.facts["Redis data kept"]]
    assert {path.owner() for path in (rig.data, *rig.data.rglob("*"))} == {rig.account.name}
    assert catalogue.open_backup(DirectoryStore(rig.store), report.facts["backup"]).verified
    _survives_a_restart(rig, before)


def _survives_a_restart(rig: Rig, before: dict[int, dict[bytes, object]]) -> None:
    rig.client().set("new", "after the restore")
    rig.services.stop("redis")
    rig.services.start("redis")
    rig.wait()
    assert rig.client().get("new") == b"after the restore"
    rig.client().delete("new")
    assert account(rig.client()) == survivors(before[0])


def test_data_directory_gone(rig: Rig) -> None:
    """Removed under the running server, with an AOF and save points that can no longer be written."""
    fill({0: rig.client()})
    before = account(rig.client())
    backup()
    shutil.rmtree(rig.data)
    report = restore()
    assert report.status is Status.OK, report.sentence()
    assert account(rig.client()) == survivors(before)
    assert report.facts["Redis data kept"] == "there was none"


def test_damage_with_valid_checksums_is_refused(rig: Rig) -> None:
    """A flipped byte, an RDB of other content, an emptied sidecar: each with a manifest that matches its files."""
    fill({0: rig.client()})
    name = backup()
    before, started = account(rig.client()), rig.run_id()
    good = rig.root / "good"
    shutil.copytree(rig.store / name, good)
    rig.client().hset("profile", "f7", "changed")
    rig.client().bgsave()
    changed = _saved(rig)
    rig.client().hset("profile", "f7", "氏名 7")

    def flip(path: Path) -> None:
        content = bytearray((path / "dump.rdb").read_bytes())
        content[len(content) // 2] ^= 1
        (path / "dump.rdb").write_bytes(content)

    kinds = {
        "the backup loads": flip,
        "keys without a TTL have other content": lambda path: shutil.copy(changed, path / "dump.rdb"),
        "missing or empty": lambda path: (path / "dump.rdb").write_bytes(b""),
        "expiring.tsv.zst has 0 keys": lambda path: shutil.copy(_empty_sidecar(rig), path / EXPIRING),
    }
    for told, harm in kinds.items():
        harm(rig.store / name)
        _reseal(rig.store / name)
        sentence = refused(name)
        assert told in sentence, sentence
        assert rig.run_id() == started, "the service was touched"
        assert account(rig.client()) == before
        shutil.rmtree(rig.store / name)
        shutil.copytree(good, rig.store / name)
    (rig.store / name / "dump.rdb").write_bytes(b"x")
    assert "dump.rdb has 1 bytes" in refused(name)


def _saved(rig: Rig) -> Path:
    until(lambda: not rig.client().info("persistence")["rdb_bgsave_in_progress"], what="a save's end", seconds=120)
    return Path(shutil.copy(rig.data / "my dump.rdb", rig.root / "changed.rdb"))


def _empty_sidecar(rig: Rig) -> Path:
    path = rig.root / "empty"
    path.write_bytes(codec.compress(b""))
    return path


def _reseal(path: Path) -> None:
    """Whoever spoilt the backup wrote a manifest that fits."""
    told = manifest.read(path)
    manifest.write(path, told.model_copy(update={"files": manifest.sums_of(path)}))
    assert not manifest.damage(path, manifest.read(path).files)


def test_foreign_rdb_is_refused_by_name(rig: Rig) -> None:
    """A backup of Redis 8 on Valkey 9, or the reverse: refused before anything stops, in words."""
    own = family(program_version(rig.environment.redis))
    other, header = ("redis", b"REDIS0012") if own == "valkey" else ("valkey", b"VALKEY080")
    fill({0: rig.client()})
    name = backup()
    path = rig.store / name
    content = (path / "dump.rdb").read_bytes()
    (path / "dump.rdb").write_bytes(header + content[9:])
    text = (path / "manifest.json").read_text().replace(f'"{own} ', f'"{other} ')
    (path / "manifest.json").write_text(text)
    (path / "manifest.json.sha256").write_text(manifest.seal_of(text))
    _reseal(path)
    sentence = refused()
    assert f"cannot read the RDB of {other}" in sentence


def test_wrong_password_is_one_sentence(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backup and restore say what is wrong, and no password stands in a report."""
    rig.client().set("a", 1)
    backup()
    for wrong in ("wr0ng-secret", ""):
        monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", wrong)
        with pytest.raises(RunbookFailed) as failure:
            backup_redis.fn(NAME)
        assert "refuses the password" in failure.value.report.sentence()
        assert failure.value.report.path
        assert "password" in refused()
    for path in (*(rig.root / "reports").iterdir(), *rig.store.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            assert PASSWORD.encode() not in content, path
            assert b"wr0ng-secret" not in content, path
    assert b"********" in next(rig.store.rglob("configuration-0-*")).read_bytes()


def test_a_server_that_starts_empty_is_noticed(rig: Rig) -> None:
    """The seeded failure of the last check: the configuration changes between proof and start, the AOF is not found."""
    fill({0: rig.client()})
    backup()
    env, report = rig.environment, Report("trial", NAME, NAME)
    source = catalogue.find_backup(DirectoryStore(rig.store), "redis")
    restore = replacing(report, env, source)
    effect = Effect("", "", (loss_of(source),))

    def carry_out() -> None:
        with carrying_out(report, *restore.lines, effect=effect) as carry:
            copy = restore.build(carry)
            rig.configure(aof=True, extra='appenddirname "elsewhere"\n')
            restore.replace(carry, copy)

    with pytest.raises(RunbookFailed):
        carry_out()
    assert report.status is Status.CRITICAL
    assert "loaded 0 keys at its start" in report.sentence()
    assert "undo-restore-redis with kept=data.superseded_" in report.sentence()


def test_reports_are_json(rig: Rig) -> None:
    """The page and the JSON file carry the proof."""
    rig.client().set("a", 1)
    report = backup_redis.fn(NAME)
    assert report.path
    told = json.loads(report.path.read_text())
    assert told["evidence"][0]["rows"] == [["db 0", "1", "1", "0", "(none) 1"]]
    with pytest.raises(Exception, match="there is no redis backup"):
        restore("20200101")
