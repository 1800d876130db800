"""Redis's backups in a bucket, encrypted: restored from there like from a directory."""

from __future__ import annotations

import pytest
from pyrage import x25519

from flows.redis.persistence import backup_redis, restore_redis
from runbook.report import Status
from tasks.backups import catalogue
from tasks.stores.store import store_of
from tests.redis.conftest import NAME, Rig
from tests.s3.servers import ACCESS_KEY, SECRET_KEY, S3Server


def test_a_snapshot_comes_back_from_a_bucket(rig: Rig, gateway: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    key = x25519.Identity.generate()
    monkeypatch.setenv("OPS_TEST_S3_SECRET", SECRET_KEY)
    monkeypatch.setenv("OPS_TEST_IDENTITY", str(key))
    rig.client().mset({f"session:{number}": "x" * 100 for number in range(500)})
    bucket = gateway.bucket()
    place = f'redis = "s3://{bucket.bucket}/grc"\nspool = "{rig.root}/spool"\nendpoint = "{gateway.endpoint}"\n'
    keys = f'recipients = ["{key.to_public()}"]\nidentity_env = "OPS_TEST_IDENTITY"\n'
    login = f'region = "us-east-1"\naccess_key = "{ACCESS_KEY}"\nsecret_key_env = "OPS_TEST_S3_SECRET"\n'
    before = rig.toml.read_text()
    rig.toml.write_text(before.replace(f'redis = "{rig.root}/backups"\n', place + login + keys))
    try:
        backup_redis.fn(NAME)
        store = store_of(rig.environment, "redis")
        assert [len(catalogue.names(store, "redis")), rig.store.exists()] == [1, False]
        rig.client().flushdb()
        report = restore_redis.fn(NAME, confirm=NAME)
    finally:
        rig.toml.write_text(before)
    assert report.status in (Status.OK, Status.WARN)
    rig.wait()
    assert rig.client().dbsize() == 500
    assert list((rig.root / "spool" / NAME / "backups" / "redis").iterdir()) == []
