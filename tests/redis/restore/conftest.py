"""A replica of the rig's server."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.redis.conftest import Rig
from tests.redis.restore.test_isolation import AUTH
from tests.redis.servers import RedisServer


@pytest.fixture
def replica(rig: Rig) -> Iterator[RedisServer]:
    """Of the rig's server, without Sentinels: the environment lists it."""
    rig.configure(aof=True, extra=AUTH)
    rig.account.own(rig.configuration)
    rig.account.own(rig.root)
    rig.services.stop("redis")
    rig.services.start("redis")
    rig.wait()
    found = RedisServer(settings=(f"replicaof 127.0.0.1 {rig.port}",), executable=rig.program)
    plain = rig.toml.read_text()
    rig.toml.write_text(plain.replace("[redis]\n", f'[redis]\nreplicas = ["{found.address}"]\n'))
    try:
        found.start()
        yield found
    finally:
        found.remove()
        rig.toml.write_text(plain)
        os.chown(rig.root, os.geteuid(), os.getegid())
