"""Migrations: revisions, heads, what is pending, and an upgrade of exactly one database."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import psycopg
import pytest

from blocks.postgres.server import Postgres
from runbook.errors import NotConfirmed, OpsError
from tasks.migrations import locks
from tasks.migrations.alembic import read_revision, upgrade
from tasks.migrations.columns import count_filled
from tasks.migrations.locks import HeldTableLock, table_sizes
from tasks.migrations.rehearsal import MigrationLoss, RehearsedState, differences, losses, read_live_schema
from tasks.migrations.scripts import MigrationHeads, Script, read_heads
from tasks.postgres.content.definitions import read_definitions
from tests.fixtures.servers import ROLE_PASSWORD, PostgresServer
from tests.tasks.conftest import BACKEND, application_at


@pytest.fixture
def backend(tmp_path: Path) -> Path:
    """A copy of the application's Alembic environment, to be changed."""
    shutil.copytree(BACKEND / "alembic", tmp_path / "alembic", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(BACKEND / "alembic.ini", tmp_path)
    return tmp_path


def add(backend: Path, revision: str, down: str, body: str = "pass", imports: str = "") -> None:
    text = f'"""Title of {revision}."""\n{imports}\nfrom alembic import op\nrevision = {revision!r}\ndown_revision = {down!r}\n'
    text += f"branch_labels = depends_on = None\ndef upgrade():\n    {body}\ndef downgrade():\n    pass\n"
    (backend / "alembic" / "versions" / f"{revision}_x.py").write_text(text)


def test_an_empty_database_is_brought_to_the_head_and_then_nothing_is_pending(
    empty: Postgres, postgres_server: PostgresServer
) -> None:
    application = application_at()
    assert read_revision(empty, empty.database) == ""
    heads = read_heads(application)
    assert [script.revision for script in heads.pending("")] == ["0001", "0002", "0003", "0004", "0005"]

    done = upgrade.work(empty, application, empty.database)

    assert (done.before, done.after) == ("", heads.one())
    assert "Running upgrade" in done.output
    assert read_revision(empty, empty.database) == "0005"
    owner = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'"
    assert postgres_server.sql(owner, database=empty.database) == [("grc_user",)], "as the application's role"
    again = upgrade.work(empty, application, empty.database)
    assert (again.before, again.after, again.seconds) == ("0005", "0005", 0.0)


def test_only_the_named_database_is_migrated(
    empty: Postgres, interview: Postgres, postgres_server: PostgresServer
) -> None:
    """A copy beside is migrated under the live database's permit; `.env` and the block name the live one."""
    copy = f"{empty.database}_restoring"
    postgres_server.create_database(copy)
    try:
        upgrade.work(empty, application_at(), copy, "0002")
        assert read_revision(empty, copy) == "0002"
        assert read_revision(empty, empty.database) == ""
    finally:
        postgres_server.drop_database(copy)


def test_without_a_plan_nothing_happens(empty: Postgres) -> None:
    with pytest.raises(NotConfirmed):
        upgrade.bind(empty, application_at())(empty.database)
    assert read_revision(empty, empty.database) == ""


def test_two_heads_are_an_error_that_names_both(empty: Postgres, backend: Path) -> None:
    add(backend, "0006a", "0005")
    add(backend, "0006b", "0005")
    application = application_at(backend)
    assert set(read_heads(application).names) == {"0006a", "0006b"}
    with pytest.raises(OpsError, match="2 heads.*0006"):
        upgrade.work(empty, application, empty.database)
    assert read_revision(empty, empty.database) == ""


def test_a_revision_by_its_beginning_and_none_that_is_an_option(empty: Postgres) -> None:
    heads = read_heads(application_at())
    assert heads.resolve("0003") == "0003"
    for wrong in ("9999", "--sql", "", "000"):
        with pytest.raises(OpsError, match="of this application"):
            heads.resolve(wrong)


def test_a_schema_newer_than_the_code_is_refused(empty: Postgres, postgres_server: PostgresServer) -> None:
    application = application_at()
    upgrade.work(empty, application, empty.database)
    postgres_server.sql("UPDATE alembic_version SET version_num = '0099'", database=empty.database)
    with pytest.raises(OpsError, match="0099, which this application does not know"):
        upgrade.work(empty, application, empty.database)


def test_a_failing_migration_names_its_cause_keeps_the_revision_and_no_secret(empty: Postgres, backend: Path) -> None:
    add(backend, "0006", "0005", "op.execute('CREATE TABLE half (x int)'); op.execute('SELECT * FROM nowhere')")
    with pytest.raises(OpsError, match='relation "nowhere" does not exist') as raised:
        upgrade.work(empty, application_at(backend), empty.database)
    assert ROLE_PASSWORD not in str(raised.value)
    assert read_revision(empty, empty.database) == "", "one transaction"


def test_a_migration_that_prints_its_address_shows_no_password(empty: Postgres, backend: Path) -> None:
    body = "import os; raise RuntimeError('cannot use ' + os.environ['DATABASE_URL'].replace('grc_user', 'x'))"
    add(backend, "0006", "0005", body)
    with pytest.raises(OpsError, match=r"cannot use postgresql://x:\*\*\*\*") as raised:
        upgrade.work(empty, application_at(backend), empty.database)
    assert "word-4712" not in str(raised.value), "its digits alone may be those of the database's name, or of the port"


def test_a_migration_that_waits_for_a_lock_gives_up(
    interview: Postgres, postgres_server: PostgresServer, backend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.migrations.program.LOCK_TIMEOUT", "-c lock_timeout=300ms")
    add(backend, "0006", "0005", "op.execute('ALTER TABLE users ADD COLUMN x int')")
    with postgres_server.connect(interview.database) as other, other.transaction():
        other.execute("SELECT count(*) FROM users")
        with pytest.raises(OpsError, match="lock timeout"):
            upgrade.work(interview, application_at(backend), interview.database)


def test_scripts_that_import_the_application_are_read_with_its_python(backend: Path) -> None:
    (backend / "models.py").write_text("NAME = 'x'\n")
    add(backend, "0006", "0005", imports="import models")
    assert read_heads(application_at(backend)).one() == "0006"
    assert list(backend.rglob("__pycache__")) == [], "nothing of ours in the application's directory"


def test_what_cannot_be_read_is_said(
    interview: Postgres, postgres_server: PostgresServer, tmp_path: Path, backend: Path
) -> None:
    with pytest.raises(OpsError, match=r"there is no .*alembic\.ini"):
        read_heads(application_at(tmp_path / "nowhere"))
    add(backend, "0006", "0005", imports="import no_such_module")
    with pytest.raises(OpsError, match="cannot be read.*no_such_module"):
        read_heads(application_at(backend))
    postgres_server.sql("ALTER TABLE alembic_version RENAME version_num TO other", database=interview.database)
    with pytest.raises(OpsError, match="revision .* cannot be read"):
        read_revision(interview, interview.database)


def heads(*scripts: tuple[str, str]) -> MigrationHeads:
    """`(revision, "what it follows")`, oldest first."""
    made = tuple(Script(name, tuple(down.split()), name, Path(f"{name}.py")) for name, down in reversed(scripts))
    followed = {name for script in made for name in script.down}
    return MigrationHeads(tuple(s.revision for s in made if s.revision not in followed), made)


LINE = heads(("a1", ""), ("b2", "a1"), ("c3", "b2"), ("d4", "c3"))
FORK = heads(("a1", ""), ("b2", "a1"), ("c3", "a1"), ("m4", "b2 c3"))


@pytest.mark.parametrize(
    ("current", "revision", "expected"),
    [
        ("d4", "-1", ("c3", ["d4"])),
        ("d4", "-3", ("a1", ["d4", "c3", "b2"])),
        ("b2", "base", ("", ["b2", "a1"])),
        ("b2", "-2", ("", ["b2", "a1"])),
        ("d4", "b", ("b2", ["d4", "c3"])),
        ("c3", "c3", ("c3", [])),
        ("", "base", ("", [])),
    ],
)
def test_what_a_downgrade_undoes(current: str, revision: str, expected: tuple[str, list[str]]) -> None:
    target, undone = LINE.undone(current, revision)
    assert (target, [script.revision for script in undone]) == expected


@pytest.mark.parametrize(
    ("history", "current", "revision", "problem"),
    [
        (LINE, "b2", "-3", "more than the number of applied migrations"),
        (LINE, "", "-1", "more than"),
        (LINE, "b2", "d4", "is not below b2"),
        (LINE, "b2", "-0", "not a revision"),
        (LINE, "b2", "zz", "not a revision"),
        (LINE, "zz", "-1", "does not know"),
        (FORK, "m4", "-1", "several predecessors"),
        (FORK, "m4", "b2", "there is a merge in between"),
        (FORK, "b2,c3", "a1", "several revisions at once"),
    ],
)
def test_ways_down_that_are_refused(history: MigrationHeads, current: str, revision: str, problem: str) -> None:
    with pytest.raises(OpsError, match=problem):
        history.undone(current, revision)


def test_below_a_fork_the_way_down_is_clear_and_plus_one_is_the_next() -> None:
    assert [script.revision for script in FORK.undone("m4", "a1")[1]] == ["m4", "c3", "b2"]
    assert [script.revision for script in LINE.pending("b2", "+1")] == ["c3"]
    assert [script.revision for script in LINE.pending("b2", "+9")] == ["c3", "d4"]
    assert LINE.pending("d4", "+1") == ()
    with pytest.raises(OpsError, match="not a revision"):
        LINE.pending("b2", "+0")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def downgrade():\n    pass", "empty"),
        ("def downgrade() -> None:\n    '''Nothing to do.'''\n    ...", "empty"),
        ("def downgrade():\n    print('sorry')\n    return None", "empty"),
        ("def downgrade():\n    raise NotImplementedError", "raises"),
        ("", "missing"),
        ("def downgrade():\n    op.execute('SELECT 1')", "written"),
        ("def _back(): op.execute('x')\ndowngrade = _back", "written"),
        ("def downgrade():\n    op.execute('x')\ndef downgrade():\n    pass", "empty"),
    ],
)
def test_a_downgrade_is_read_and_never_run(backend: Path, body: str, expected: str) -> None:
    text = f"from alembic import op\nrevision = '0006'\ndown_revision = '0005'\nbranch_labels = depends_on = None\n{body}\n"
    (backend / "alembic" / "versions" / "0006_x.py").write_text(
        text + "def upgrade():\n    with op.get_context().autocommit_block():\n        op.execute('x')\n"
    )
    newest = read_heads(application_at(backend)).scripts[0]
    assert newest.downgrade == expected
    assert newest.reversible is (expected == "written")
    assert not newest.transactional
    assert newest.path.name == "0006_x.py"
    assert read_heads(application_at(backend)).scripts[1].transactional


def test_a_merge_has_nothing_to_undo(backend: Path) -> None:
    text = "revision = '0006'\ndown_revision = '0005'\nbranch_labels = depends_on = None\n"
    path = backend / "alembic" / "versions" / "0006_merge.py"
    path.write_text(text + "def upgrade(): pass\ndef downgrade(): pass\n")
    assert read_heads(application_at(backend)).scripts[0].reversible
    path.write_text(text + "import models\ndef upgrade(): pass\n")
    (backend / "models.py").write_text("")
    newest = read_heads(application_at(backend)).scripts[0]
    assert (newest.downgrade, newest.reversible) == ("missing", False), "also when the application's Python reads them"


def watch(
    postgres: Postgres, *statements: str, autocommit: bool = False, clock: list[float] | None = None
) -> dict[tuple[str, str], HeldTableLock]:
    """Run statements as the application's role and note the revision, all in one transaction (or none). `clock`: when
    each was sent, and when all was over."""
    times = [] if clock is None else clock
    with postgres.connect(postgres.database) as admin:
        admin.execute("ANALYZE")  # as a copy is
        live = table_sizes(postgres)
        assert locks.install(admin, postgres.user)
        with postgres.connect(postgres.database, as_application=True, autocommit=autocommit) as session:
            for statement in (*statements, "UPDATE alembic_version SET version_num = '0006'"):
                times.append(time.monotonic())
                session.execute(statement.encode())
            session.commit()
            times.append(time.monotonic())
        found = locks.read(admin, "up", live)
        locks.remove(admin)
    assert all(lock.revision == "0006" for lock in found.locks)
    return {(lock.table.removeprefix("public."), lock.mode): lock for lock in found.locks}


def test_every_lock_that_blocks_writes_is_seen(interview: Postgres) -> None:
    clock: list[float] = []
    found = watch(
        interview,
        "ALTER TABLE users ADD COLUMN x int",
        "CREATE INDEX ix ON evaluations (overall)",
        "CREATE TABLE made (session uuid REFERENCES interview_sessions)",
        "ALTER TABLE made ADD COLUMN y int",
        "UPDATE interview_messages SET tokens = 1",
        "TRUNCATE audit_events_2026_08",
        "SELECT pg_sleep(0.3)",
        clock=clock,
    )
    assert set(found) == {
        ("users", "ACCESS EXCLUSIVE"),
        ("evaluations", "SHARE"),
        ("interview_sessions", "SHARE ROW EXCLUSIVE"),
        ("audit_events_2026_08", "ACCESS EXCLUSIVE"),
    }, "none on a table that the migration makes, none of plain writes"
    longest = clock[-1] - clock[0]
    assert all(0.3 <= lock.seconds <= longest for lock in found.values()), "held to the end of the transaction"
    assert found["users", "ACCESS EXCLUSIVE"].rows == 20
    assert not found["users", "ACCESS EXCLUSIVE"].rewrites


def test_a_rewrite_a_dropped_table_and_a_partition_s_parent_are_seen(interview: Postgres) -> None:
    found = watch(
        interview,
        "ALTER TABLE evaluations ALTER COLUMN technical TYPE numeric(9, 4)",
        "ALTER TABLE audit_events ADD COLUMN x int",
        "DROP TABLE interview_messages CASCADE",
    )
    assert found["evaluations", "ACCESS EXCLUSIVE"].rewrites
    assert ("interview_messages", "ACCESS EXCLUSIVE") in found
    assert found["audit_events", "ACCESS EXCLUSIVE"].rows == 20, "its partitions' together"
    assert ("audit_events_default", "ACCESS EXCLUSIVE") in found


def test_the_sizes_of_live_tables_are_not_waited_for_without_limit(
    interview: Postgres, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.postgres.upkeep.session.LOCK_SECONDS", 0.2)
    with postgres_server.connect(interview.database) as other, other.transaction():
        other.execute("LOCK TABLE users")
        with pytest.raises(OpsError, match="the lock was not available"):
            table_sizes(interview)


def test_a_concurrent_index_blocks_nobody_and_the_watch_leaves_nothing(interview: Postgres) -> None:
    before = read_definitions(interview, interview.database)
    assert watch(interview, "CREATE INDEX CONCURRENTLY ix ON users (display_name)", autocommit=True) == {}
    with interview.connect(interview.database) as connection:
        connection.execute("DROP INDEX ix")
    assert read_definitions(interview, interview.database) == before


def test_a_lock_of_a_transaction_of_its_own_is_seen_and_one_that_comes_late_is_not_held_from_the_start(
    interview: Postgres,
) -> None:
    assert ("users", "SHARE") in watch(interview, "CREATE INDEX ix ON users (display_name)", autocommit=True)
    clock: list[float] = []
    statements = ("SELECT pg_sleep(0.6)", "ALTER TABLE users ADD COLUMN x int", "TRUNCATE audit_events_2026_08")
    late = watch(interview, *statements, clock=clock)
    longest = clock[-1] - clock[1]
    assert late["users", "ACCESS EXCLUSIVE"].seconds <= longest
    assert late["audit_events_2026_08", "ACCESS EXCLUSIVE"].seconds <= longest, "no DDL: since the statement before"


def test_an_index_that_a_cut_build_left_is_seen(interview: Postgres) -> None:
    before = read_live_schema(interview, interview.database)
    with interview.connect(interview.database) as connection, pytest.raises(psycopg.errors.UniqueViolation):
        connection.execute("CREATE UNIQUE INDEX CONCURRENTLY ix ON interview_messages (content)")
    assert differences(before, read_live_schema(interview, interview.database)) == ("INDEX ix (invalid) is new",)


def test_a_login_that_may_not_watch_says_so(interview: Postgres) -> None:
    with interview.connect(interview.database, as_application=True) as connection:
        assert not locks.install(connection, interview.user)
        assert connection.execute("SELECT to_regnamespace('ops_rehearsal')").fetchone() == (None,)


def test_how_two_states_differ() -> None:
    table = "CREATE TABLE t (\n    a integer,\n    b text\n);\n"
    turned = "CREATE TABLE t (\n    b text,\n    a integer\n);\n"
    key = "TABLE public.t (owner x)"
    assert differences({key: table}, {key: turned}) == (), "a column that was dropped comes back at the end"
    assert differences({key: table}, {}) == (f"{key} is missing",)
    assert differences({}, {key: table}) == (f"{key} is new",)
    assert "differs" in differences({key: table}, {key: table.replace("text", "varchar")})[0]
    before = RehearsedState({}, {"t": {"a": "1", "b": "2", "c": "3"}, "u": {"a": "4"}}, {"t": 5, "u": 3, "v": 2})
    after = RehearsedState({}, {"t": {"a": "1", "d": "3"}}, {"t": 5, "v": 1})
    assert losses(before, after) == (
        MigrationLoss("u", 3, dropped=True),
        MigrationLoss("v", 1),
        MigrationLoss("t", 5, ("b",)),
    ), "c is d now"
    anew = RehearsedState({}, {"t": {"a": "1", "b": "5", "c": "3"}, "u": {"a": "4"}}, before.rows)
    assert losses(before, anew) == (MigrationLoss("t", 5, ("b",)),), "another column took its name"


def test_rows_are_counted_in_which_a_column_is_filled(interview: Postgres, postgres_server: PostgresServer) -> None:
    postgres_server.sql(
        """
        CREATE TYPE pair AS (x int, y int);
        CREATE TABLE "Odd; one" (a int, "b c" text, whole pair, twice int GENERATED ALWAYS AS (2) STORED);
        INSERT INTO "Odd; one" VALUES (1, NULL), (NULL, 'x'), (NULL, NULL), (1, 'both');
        INSERT INTO "Odd; one" (whole) VALUES (ROW(NULL, 1));
        CREATE TABLE child () INHERITS ("Odd; one");
        INSERT INTO child VALUES (7);
        CREATE TABLE split (k int, a int) PARTITION BY RANGE (k);
        CREATE TABLE split_1 PARTITION OF split DEFAULT;
        INSERT INTO split VALUES (1, 1), (2, NULL)
        """,
        database=interview.database,
    )
    odd, split = 'public."Odd; one"', "public.split"
    columns = ((odd, ("a", "b c", "whole", "twice")), ("public.child", ("a",)), (split, ("a",)))
    assert count_filled(interview, interview.database, columns) == {odd: 4, "public.child": 1, split: 1}
    assert count_filled(interview, interview.database, ((odd, ("twice",)), ("public.gone", ("x",)))) == {
        odd: 0,
        "public.gone": 0,
    }


def test_a_script_s_top_level_runs_and_its_functions_do_not(backend: Path, tmp_path: Path) -> None:
    """What the docstrings say of reading the scripts."""
    top, body = tmp_path / "top", tmp_path / "body"
    add(
        backend,
        "0006",
        "0005",
        f"pathlib.Path({str(body)!r}).touch()",
        f"import pathlib; pathlib.Path({str(top)!r}).touch()",
    )
    assert read_heads(application_at(backend)).one() == "0006"
    assert top.exists()
    assert not body.exists()
