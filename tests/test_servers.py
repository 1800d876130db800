"""The test servers themselves: started, stopped, reached through the block as both roles."""

from __future__ import annotations

import os
import subprocess
import sys

import psycopg
import pytest

from lab import control, lifecycle
from lab.state import state
from lab.state.base import CHECKOUT
from runbook.errors import Unreachable
from tests.fixtures import ports
from tests.fixtures.servers import (
    PostgresServer,
    free_port,
    others_ports,
    running_postgres,
    separate_base,
    taken_ports,
)


def test_a_server_is_reached_through_its_block_as_both_roles(postgres_server: PostgresServer) -> None:
    postgres_server.create_database("servers_db")
    try:
        block = postgres_server.block("servers_db")
        with block.connect("servers_db") as admin, block.connect("servers_db", as_application=True) as role:
            assert admin.execute("SELECT current_user").fetchone() == ("postgres",)
            assert role.execute("SELECT current_user").fetchone() == ("grc_user",)
    finally:
        postgres_server.drop_database("servers_db")


def test_a_killed_server_comes_back_with_its_data_and_leaves_nothing_behind() -> None:
    with running_postgres() as server:
        server.sql("CREATE TABLE kept AS SELECT 7 AS value")
        server.crash()
        with pytest.raises(Unreachable):
            server.block().connect("postgres")
        server.start()
        assert server.sql("SELECT value FROM kept") == [(7,)]
        with pytest.raises(psycopg.errors.UndefinedTable):
            server.sql("SELECT * FROM missing")
        assert "missing" in server.log_tail()
    assert not server.root.exists()


def test_no_server_takes_the_ports_that_a_lab_will_listen_on() -> None:
    """A lab of this run has its ports from the beginning on, and listens there an hour later perhaps."""
    chosen = {
        int(value) for name, value in os.environ.items() if name.startswith("OPS_LAB_") and name.endswith("_PORT")
    }
    assert len(chosen) > 10
    assert chosen <= set(taken_ports())
    assert int(os.environ["PREFECT_API_URL"].split(":")[2].split("/")[0]) in taken_ports()


def test_a_base_of_its_own_takes_no_port_of_this_run() -> None:
    with separate_base("ports") as base:
        for module in (control, lifecycle):
            assert taken_ports() <= set(module.taken_ports(base))
    assert control.taken_ports is lifecycle.taken_ports is state.taken_ports


def test_of_two_workers_no_server_takes_the_other_s_port_nor_one_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_port() in taken_ports()
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    shares = list[int]()
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        shares += set(state.PORTS) - others_ports.__wrapped__()
    assert sorted(shares) == list(state.PORTS)


def test_of_two_runs_none_takes_a_port_that_the_other_s_lab_will_listen_on() -> None:
    """Also in another checkout."""
    argv = [sys.executable, "-c", "from tests.fixtures import ports; print(ports.claim_ports()); input()"]
    with subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        theirs = range(*map(int, other.stdout.readline().split("-")))
        assert len(theirs) in (ports.EACH, ports.EACH * ports.RUNS)
        if len(theirs) == ports.EACH == len(state.PORTS):  # not more runs than parts at this moment
            assert not set(theirs) & set(state.PORTS)
            assert not state.is_free(theirs.start)
        other.communicate("ended")
    assert os.environ[ports.VARIABLE] == f"{state.PORTS.start}-{state.PORTS.stop}"
