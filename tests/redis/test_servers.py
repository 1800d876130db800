"""The test servers themselves, and the block's words for what a server refuses."""

from __future__ import annotations

import pytest
import redis

from runbook.errors import OpsError, Unreachable
from tasks.redis.server import connected
from tests.redis.servers import Group, RedisServer, notice_deaths


def test_a_crashed_master_is_replaced_and_the_group_is_found_again(group: Group) -> None:
    group.master.client().set("k", "v")
    group.in_step()
    group.master.crash()
    notice_deaths(group.sentinels)
    new = group.wait_for_master_other_than(group.master)
    assert new.client().get("k") == b"v"
    assert group.agreed_master() == new.address


def test_what_a_server_refuses_is_said_in_one_sentence(server: RedisServer) -> None:
    with pytest.raises(OpsError, match="refuses the password"), connected(server.block(password="no")):
        pass
    server.client().acl_setuser("ops", enabled=True, passwords=["+x"], keys=["*"], commands=["+ping", "+client"])
    with (
        pytest.raises(OpsError, match=r"forbids user ops the command CONFIG\|GET — ACL SETUSER ops \+config\|get"),
        connected(server.block(username="ops", password="x")) as client,
    ):
        client.config_get("dir")
    server.crash()
    with pytest.raises(Unreachable, match="does not answer"), connected(server.block()):
        pass


def test_a_frozen_server_is_unreachable(server: RedisServer) -> None:
    client = server.client(socket_timeout=0.3)
    server.freeze()
    with pytest.raises(redis.TimeoutError):
        client.ping()
    server.thaw()
    assert server.client().ping()
