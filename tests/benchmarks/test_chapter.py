"""What the database chapter's benchmark compares: the same dead rows on both sides, S3 with and without a start-up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from benchmarks.chapter import VACUUM, Chapter, s3_figures
from benchmarks.figures import as_table
from benchmarks.peers import Peers
from benchmarks.place import DATABASE, Called, Place, call
from lab.client import Lab
from runbook.errors import OpsError
from tests.database.conftest import NAME as TRIAL
from tests.database.conftest import write_environment
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer

TABLES = ("interview_messages", "audit_events")


@pytest.fixture
def place(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Place]:
    """The bench's database as far as dead rows are concerned; autovacuum stays away."""
    postgres_server.create_database(DATABASE)
    for table in TABLES:
        postgres_server.sql(
            f"CREATE TABLE {table} (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), body text) "
            "WITH (autovacuum_enabled = off); "
            f"INSERT INTO {table} (body) SELECT repeat('x', 300) FROM generate_series(1, 5000)",
            database=DATABASE,
        )
    dsn = make_conninfo(host="127.0.0.1", port=postgres_server.port, user="postgres", password=ADMIN_PASSWORD)
    status = {"postgres": {"admin_dsn": dsn}, "root": str(tmp_path)}
    yield Place(Lab("bench"), status, lambda line: None)
    postgres_server.drop_database(DATABASE)


def test_dead_rows_are_made_all_over_the_pages_and_no_row_is_added(place: Place) -> None:
    before = place.sql("SELECT count(*), md5(string_agg(id::text, ',' ORDER BY id)) FROM audit_events", DATABASE)
    place.sql("VACUUM ANALYZE", DATABASE)
    assert place.dead_rows() == 0
    made = place.make_dead_rows()
    assert 300 < made < 500, "4 % of 10,000"
    after = place.sql("SELECT count(*), md5(string_agg(id::text, ',' ORDER BY id)) FROM audit_events", DATABASE)
    assert before == after
    place.sql("VACUUM ANALYZE", DATABASE)
    assert place.dead_rows() == 0
    assert place.make_dead_rows() == made, "the same for the other side"


class Trial(Place):
    """The bench's place, but for what needs its lab: a flow's call vacuums here, or forgets to."""

    def settle(self, expected: object) -> None:
        self.sql("VACUUM (ANALYZE)", DATABASE)

    def call(self, flow: str, *, direct: bool = False, **parameters: object) -> Called:
        self.status["found"].append(self.dead_rows())
        if parameters["works"]:
            self.sql("VACUUM (ANALYZE)", DATABASE)
        return Called(1.0, (), {})


class Programs(Peers):
    """vacuumdb, as a statement."""

    def run(self, argv: list[str]) -> float:
        self.place.status["found"].append(self.place.dead_rows())
        self.place.sql("VACUUM (ANALYZE)", DATABASE)
        return 0.5


def test_both_sides_of_the_vacuum_find_the_same_to_do(place: Place) -> None:
    place.status["found"] = []
    trial = Trial(place.lab, place.status, place.tell)
    chapter = Chapter(trial, Programs(trial), {})
    figure = chapter._against(VACUUM, {"works": True}, ["vacuumdb", "--analyze"], dead=True)
    found = place.status["found"]
    assert len(found) == 4
    assert min(found) > 300
    assert max(found) - min(found) < 20
    assert figure.value == pytest.approx(0.5)
    assert figure.name == f"vacuum_database − vacuumdb --analyze ({found[0]} dead rows each)"
    with pytest.raises(OpsError, match=r"dead rows are left"):
        chapter._against(VACUUM, {"works": False}, ["vacuumdb"], dead=True)


def test_a_flow_is_called_in_the_environment_of_the_benchmark(
    place: Place, postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process gets the variables of this one: those of the bench lab, and of its Prefect server."""
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(postgres_server, DATABASE, tmp_path)))
    monkeypatch.setenv("OPS_ENVIRONMENT", TRIAL)
    monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
    called = call("flows.database.server.connections:check_connections", TRIAL, direct=True)
    assert Path(called.report).is_relative_to(tmp_path)
    assert "read_activity" in {name for name, _, _ in called.steps}


def test_s3_is_compared_by_the_step_and_by_the_whole() -> None:
    steps = (("read_gap", 0.0, 0.1), ("copy_backup", 0.1, 4.0), ("prove_copy", 4.1, 2.0))
    figures = s3_figures([Called(6.5, steps, {})] * 3, [5.0, 5.0, 5.0], [1.0, 1.0, 1.0], 412.3)
    table = as_table(figures)
    assert [round(figure.value, 3) for figure in figures] == [0.8, 1.0, 1.3, 2.0]
    assert [figure.bar for figure in figures] == [1.0, 1.0, None, None]
    assert "hashes and sends a backup of 412 MB ÷ aws s3 cp --recursive" in table
    assert "without its start-up (aws --version: 1.00 s)" in table
    slow = s3_figures([Called(9.0, (("copy_backup", 0.0, 4.5),), {})], [5.0], [1.0], 1.0)
    assert [figure.holds for figure in slow[:2]] == [True, False], "its start-up is not ours to win by"
