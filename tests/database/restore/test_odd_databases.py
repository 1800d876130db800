"""Databases that a backup or a restore once refused, and dumps whose change once passed: each with valid checksums."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from flows.database.backup import backup_database, verify_backup
from flows.database.restore import restore_database
from flows.database.superseded import discard_superseded
from runbook import shell
from runbook.errors import OpsError, RunbookFailed
from runbook.page.render import markdown
from runbook.report import Report, Status
from tasks.backups import manifest
from tasks.postgres.content import content as large_objects
from tasks.postgres.content.comparison import compare
from tasks.postgres.content.content import content_of
from tasks.postgres.content.definitions import as_once_stored
from tasks.postgres.content.equivalence import compare_definitions
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.dump.printed import codec
from tasks.postgres.restore.staged_copy import content_in, copy_name
from tests.database.backup import test_kinds
from tests.database.backup.test_backup import newest
from tests.database.conftest import NAME, Trial
from tests.database.restore.test_restore import GOOD, reseal

EVENT_TRIGGERS = 170000


def values(report: Report) -> dict[str, str]:
    """Each finding's value, by name."""
    return {finding.name: str(finding.value) for finding in report.findings}


def version(trial: Trial) -> int:
    return int(str(trial.sql("SHOW server_version_num")[0][0]))


# A child with other columns first, whose statements follow them; a guard against DDL with a filled materialised view;
# children and readers of a foreign table that cannot be read; rows that their CHECK refuses by now; a template.
RATED = """
CREATE TABLE rates (rate int); INSERT INTO rates VALUES (2);
CREATE FUNCTION rated(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN RETURN $1 * (SELECT rate FROM rates); END $$;
"""
ODD = (
    RATED
    + """
CREATE TABLE parent (a int, b text, CONSTRAINT positive CHECK (a > 0));
CREATE TABLE second (z int, b text);
CREATE TABLE child (b text DEFAULT 'q' NOT NULL, z int DEFAULT -1::int, a int, CONSTRAINT positive CHECK (a > 0), UNIQUE (b, a));
ALTER TABLE child INHERIT parent;
ALTER TABLE child INHERIT second;
ALTER TABLE child ALTER b SET STATISTICS 5, ALTER a SET STATISTICS 7, ALTER b SET STORAGE EXTERNAL,
    ALTER a SET (n_distinct = 5), ALTER z SET (n_distinct = 7);
ALTER TABLE child ADD CONSTRAINT whole CHECK (child.* IS NOT NULL AND (a BETWEEN 1 AND 2 OR b = 'x'));
GRANT SELECT (b), UPDATE (a), SELECT (z) ON child TO grc_user;
GRANT SELECT (b, a) ON child TO pg_monitor;
CREATE INDEX ON child (b, (a + -1)) WHERE z BETWEEN 1 AND 2 AND a > 0;
CREATE VIEW of_child AS SELECT * FROM child;
INSERT INTO child VALUES ('x', 1, 2);
CREATE TABLE parted (a int, b text) PARTITION BY LIST (a);
CREATE TABLE part (b text, a int);
ALTER TABLE parted ATTACH PARTITION part FOR VALUES IN (1);
INSERT INTO parted VALUES (1, 'r');
CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
CREATE TABLE near (n int); INSERT INTO near VALUES (1);
CREATE FOREIGN TABLE far (n int) INHERITS (near) SERVER nowhere;
CREATE TABLE near_parts (n int) PARTITION BY LIST (n);
CREATE TABLE near_part PARTITION OF near_parts FOR VALUES IN (1);
CREATE FOREIGN TABLE far_part PARTITION OF near_parts FOR VALUES IN (2) SERVER nowhere;
CREATE VIEW reads_far AS SELECT 1 AS n;
CREATE MATERIALIZED VIEW "Kept far" AS SELECT n FROM reads_far;
CREATE MATERIALIZED VIEW kept_further AS SELECT n FROM "Kept far";
CREATE OR REPLACE VIEW reads_far AS SELECT n FROM far;
CREATE TABLE until (at timestamptz, CONSTRAINT future CHECK (at >= now()));
CREATE TABLE until_child () INHERITS (until);
INSERT INTO until VALUES (now()); INSERT INTO until_child VALUES (now());
CREATE TABLE sums (n int CONSTRAINT rated CHECK (rated(n) > 0)); INSERT INTO sums VALUES (1);
CREATE TABLE log_ins (who text);
GRANT INSERT ON log_ins TO PUBLIC;
CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no definitions here'; END $$;
CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.log_ins VALUES (session_user); END $$;
"""
)
AT_LOGIN = "CREATE EVENT TRIGGER note ON login EXECUTE FUNCTION note();"
GUARD = "CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse(); COMMENT ON EVENT TRIGGER refuse IS 'a';"


def guard(trial: Trial) -> str:
    """Before 17 nothing but ALTER EVENT TRIGGER … DISABLE keeps one from firing that is ENABLE ALWAYS."""
    always = "ALTER EVENT TRIGGER refuse ENABLE ALWAYS;" if version(trial) < EVENT_TRIGGERS else ""
    return f"{GUARD} {always}"


@pytest.mark.parametrize("trial", ["trial_" + "候補" * 9 + "x"], indirect=True)
def test_a_database_of_everything_that_was_refused_is_restored(trial: Trial) -> None:
    name, at_login = trial.database, version(trial) >= EVENT_TRIGGERS
    enabled = "O" if at_login else "A"
    trial.sql(ODD)
    with trial.server.connect(name) as other:
        other.execute("CREATE TEMP TABLE of_a_session (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n serial)")
        trial.sql(f'{AT_LOGIN if at_login else ""} {guard(trial)} ALTER DATABASE "{name}" IS_TEMPLATE true')
        assert backup_database.fn(NAME).status in GOOD
    before = content_in(newest(trial))
    try:
        report = restore_database.fn(NAME, confirm=NAME)
        assert report.status in GOOD
        found = values(report)
        assert found["order of columns"] == "changed in public.child"
        assert '"public"."near"' in found["planner statistics"]
        assert '"public"."near_parts"' in found["planner statistics"]
        empty = found["materialised views of foreign tables"]
        assert 'public."Kept far" is empty: foreign-data wrapper "nothing" has no handler; public.kept_further' in empty
        unchecked = report.facts["CHECK constraints that did not check the restored rows"]
        assert unchecked == "public.sums: rated, public.until: future, public.until_child: future"
        with pytest.raises(psycopg.errors.CheckViolation):
            trial.sql("INSERT INTO until VALUES ('2020-01-01')")
        after = content_of(trial.environment.postgres, name)
        assert after.properties == before.properties
        assert after.properties.template
        assert after.populated == {**before.populated, 'public."Kept far"': False, "public.kept_further": False}
        assert sorted(trial.sql("SELECT evtname, evtenabled FROM pg_event_trigger")) == [
            *([("note", "O")] if at_login else []),
            ("refuse", enabled),
        ]
        assert discard_superseded.fn(NAME, keep=0, confirm=NAME).status in GOOD
        left = trial.server.sql("SELECT datname FROM pg_database WHERE datname ~ '^trial_'")
        assert left == [(name,)], "the replaced template is dropped too"
    finally:
        for (database,) in trial.server.sql("SELECT datname FROM pg_database WHERE datname ~ '^trial_'"):
            trial.server.sql(f'ALTER DATABASE "{database}" IS_TEMPLATE false')
            if database != name:
                trial.server.drop_database(database)


def test_sql_text_with_a_guard_against_definitions_is_restored(trial: Trial) -> None:
    """pg_dump writes event triggers before it fills materialised views."""
    refuse = "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'none'; END $$;"
    trial.sql(f"{refuse} {guard(trial)}")
    assert backup_database.fn(NAME, kind="sql").status in GOOD
    assert verify_backup.fn(NAME, backup=test_kinds.newest(trial, "sql").name).status in GOOD


# One of its functions reads a table by search_path, one the clock; its text is in the database's own encoding; a child's
# columns have another order after a restore.
COMPUTED = (
    RATED
    + """
CREATE FUNCTION hour(int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT $1 || ' at ' || clock_timestamp() $$;
CREATE TABLE bought (n int CHECK (n > 0), sum int GENERATED ALWAYS AS (rated(n)) STORED, what text DEFAULT 'a',
    at text NOT NULL GENERATED ALWAYS AS (hour(n)) STORED, gone int);
ALTER TABLE bought DROP gone;
CREATE TABLE "sold\tto" (sum int GENERATED ALWAYS AS (rated(n)) STORED, n int);
CREATE TABLE ranked (n int); ALTER TABLE "sold\tto" INHERIT ranked;
INSERT INTO bought (n, what) SELECT g, '候補' || chr(9) || chr(92) || chr(10) || g FROM generate_series(1, 1000) g;
INSERT INTO "sold\tto" (n) VALUES (NULL), (7);
"""
)


def test_generated_columns_that_pg_dump_cannot_restore_are_restored_as_they_were(trial: Trial) -> None:
    trial.sql(COMPUTED)
    report = backup_database.fn(NAME)
    assert report.status in GOOD
    named = values(report)["generated columns that pg_dump cannot restore"]
    assert 'public.bought.sum: relation "rates" does not exist' in named
    assert "public.bought.at: 1,000 rows have another value than it computes now" in named
    before = content_of(trial.environment.postgres, trial.database)
    trial.sql('UPDATE bought SET n = 1 + n; DELETE FROM "sold\tto"')
    report = restore_database.fn(NAME, confirm=NAME)
    assert report.status in GOOD
    stored = report.facts["generated columns that were restored as stored, not computed"]
    assert stored == "public.bought.sum, public.bought.at, public.sold\tto.sum"
    after = content_of(trial.environment.postgres, trial.database)
    texts = compare_definitions.work(trial.environment.postgres, trial.database, before.definitions, after.definitions)
    assert compare(before, after, texts).differences == ()
    trial.sql("INSERT INTO bought (n) VALUES (5)")
    assert trial.sql("SELECT sum FROM bought WHERE n = 5 ORDER BY at DESC LIMIT 1") == [(10,)], "computed again"
    assert trial.sql("SELECT count(*) FROM pg_attribute WHERE attgenerated = 's' AND attname = 'sum'") == [(2,)]


# A foreign key that its rows break, an index and a view whose function fails without a search_path.
BROKEN = (
    RATED
    + """
CREATE TABLE users (id int PRIMARY KEY); CREATE TABLE orders (n int, CONSTRAINT of_user FOREIGN KEY (n) REFERENCES users);
COMMENT ON CONSTRAINT of_user ON orders IS 'broken';
ALTER TABLE orders DISABLE TRIGGER ALL; INSERT INTO orders VALUES (1); ALTER TABLE orders ENABLE TRIGGER ALL;
CREATE TABLE priced (n int); CREATE INDEX by_price ON priced (rated(n)); COMMENT ON INDEX by_price IS 'fails';
INSERT INTO priced VALUES (1);
"""
)
ACCEPTED = ("FK CONSTRAINT public.orders of_user", "INDEX public.by_price")


def test_what_pg_restore_cannot_build_is_named_and_left_out_once_a_person_accepts_it(
    trial: Trial, tmp_path: Path
) -> None:
    trial.sql(BROKEN)
    assert backup_database.fn(NAME).status in GOOD
    known: list[str] = []
    for _ in ACCEPTED:
        with pytest.raises(RunbookFailed) as failed:
            verify_backup.fn(NAME, accept=known)
        (given,) = re.findall(r"run this again with accept=(\[[^;]+\]) to restore without it;", str(failed.value))
        known = json.loads(given)
    assert sorted(known) == sorted(ACCEPTED)
    with pytest.raises(RunbookFailed, match=r"no INDEX public.by_prise. Next: did you mean INDEX public.by_price\?"):
        restore_database.fn(NAME, accept=["INDEX public.by_prise"], confirm=NAME)
    path = tmp_path / "trial.toml"
    text = path.read_text()
    path.write_text(text.replace("[services]", f'accept = ["{ACCEPTED[1]}", "INDEX public.of_later"]\n[services]', 1))
    plan = restore_database.fn(NAME, accept=[ACCEPTED[0]])
    assert plan.status is Status.PLANNED
    assert values(plan)["accepted as not restored"] == "; ".join(ACCEPTED)
    report = restore_database.fn(NAME, accept=[ACCEPTED[0]], confirm=NAME)
    assert report.status is Status.WARN
    assert all(f"{name} (not restored, as accepted)" in markdown(report) for name in ACCEPTED)
    assert trial.sql("SELECT to_regclass('by_price'), count(*) FROM pg_constraint WHERE conname = 'of_user'") == [
        (None, 0)
    ]
    assert trial.sql("SELECT n FROM orders") == [(1,)]


@pytest.mark.parametrize("ending", ["sql", "sql.gz"])
def test_of_sql_text_it_is_named_and_left_out_too(trial: Trial, tmp_path: Path, ending: str) -> None:
    """Each refusal names the next object; tablespace, comments and what follows them stay."""
    trial.sql(BROKEN + "CREATE VIEW later AS SELECT 'CREATE INDEX' AS kind; COMMENT ON VIEW later IS 'stays'")
    text = printed_by(trial, "pg_dump").encode()
    dump = tmp_path / f"left.{ending}"
    dump.write_bytes(gzip.compress(text) if ending == "sql.gz" else text)
    known: list[str] = []
    for _ in ACCEPTED:
        with pytest.raises((RunbookFailed, OpsError)) as failed:
            restore_database.fn(NAME, backup=str(dump), into="trial_other", accept=known, confirm=NAME)
        (given,) = re.findall(r"run this again with accept=(\[[^;]+\]) to restore without it;", str(failed.value))
        known = json.loads(given)
    assert sorted(known) == sorted(ACCEPTED)
    with pytest.raises(RunbookFailed, match=r"no INDEX public.by_prise. Next: did you mean INDEX public.by_price\?"):
        restore_database.fn(NAME, backup=str(dump), into="trial_other", accept=["INDEX public.by_prise"], confirm=NAME)
    try:
        report = restore_database.fn(NAME, backup=str(dump), into="trial_other", accept=known, confirm=NAME)
        assert values(report)["accepted as not restored"] == "; ".join(known)
        found = trial.sql(
            "SELECT to_regclass('by_price'), (SELECT count(*) FROM pg_constraint WHERE conname = 'of_user'), "
            "obj_description('later'::regclass), (SELECT kind FROM later), (SELECT count(*) FROM orders)",
            database="trial_other",
        )
        assert found == [(None, 0, "stays", "CREATE INDEX", 1)]
    finally:
        trial.server.drop_database("trial_other")


def printed_by(trial: Trial, program: str) -> str:
    return shell.run(
        [trial.server.programs / program, trial.database], environment=trial.environment.postgres.environment()
    ).stdout


def test_a_generated_column_whose_values_no_backup_has_is_left_empty_once_a_person_accepts_it(
    trial: Trial, tmp_path: Path
) -> None:
    trial.sql(RATED + "CREATE TABLE bought (n serial, sum int GENERATED ALWAYS AS (rated(n)) STORED)")
    trial.sql("INSERT INTO bought DEFAULT VALUES")
    backup_database.fn(NAME)
    path = newest(trial).path
    shutil.rmtree(path / "rows")
    sums = {name: found.model_dump() for name, found in manifest.sums_of(path).items()}
    reseal(path, lambda sealed: (sealed.update(files=sums), sealed["content"].pop("uncomputable")))
    dump = tmp_path / "left.dump"
    shell.run(
        [trial.server.programs / "pg_dump", "-Fc", "-f", dump, trial.database],
        environment=trial.environment.postgres.environment(),
    )
    wanted = "GENERATED COLUMN public.bought.sum"
    with pytest.raises((RunbookFailed, OpsError), match=re.escape(f'accept=["{wanted}"]')):
        restore_database.fn(NAME, backup=str(dump), into="trial_other", confirm=NAME)
    for chosen in (str(dump), "latest"):
        try:
            report = restore_database.fn(NAME, backup=chosen, into="trial_other", accept=[wanted], confirm=NAME)
            assert report.status is Status.WARN
            assert values(report)["accepted as not restored"] == wanted
            assert trial.sql("SELECT n, sum FROM bought", database="trial_other") == [(1, None)]
            trial.sql("UPDATE bought SET n = n; INSERT INTO bought DEFAULT VALUES", database="trial_other")
            assert trial.sql("SELECT n, sum FROM bought", database="trial_other") == [(1, 2), (2, 4)]
        finally:
            trial.server.drop_database("trial_other")
    assert f"({wanted} is empty, as accepted)" in markdown(report)


def test_two_long_names_have_copies_of_their_own() -> None:
    first, second = ("候補" * 10 + end for end in ("x", "y"))
    assert copy_name(first) != copy_name(second)
    assert all(len(copy_name(name).encode()) <= 63 and copy_name(name).endswith("__new") for name in (first, second))
    assert copy_name("short") == "short__new"


TEXT = {"EUC_JP": "候補 表示 ～", "LATIN1": "Größe é", "SQL_ASCII": "候補 表示"}
# Of a client that knows nothing of UTF-8: 表 has a backslash in Shift JIS.
CLIENT = {"EUC_JP": "SJIS", "LATIN1": "UTF8", "SQL_ASCII": "EUC_JP"}
WRITTEN = """
CREATE TABLE "T {0}" (id serial PRIMARY KEY, "c {0}" text DEFAULT '{0}', CONSTRAINT "k {0}" CHECK ("c {0}" BETWEEN '!' AND '{0}' AND id > 0));
INSERT INTO "T {0}" ("c {0}") VALUES ('{0}');
CREATE TYPE "e {0}" AS ENUM ('{0}');
CREATE FUNCTION "f {0}"() RETURNS text LANGUAGE sql AS $$ SELECT '{0}'::text $$;
COMMENT ON TABLE "T {0}" IS '{0}';
CREATE MATERIALIZED VIEW "m {0}" AS SELECT '{0}'::text AS "c {0}";
"""


@pytest.mark.parametrize("encoding", ["EUC_JP", "LATIN1", "SQL_ASCII"])
def test_another_encoding_is_backed_up_compared_and_restored(trial: Trial, encoding: str) -> None:
    """With a locale of the C library, whatever template0 has, and with clients of a third encoding."""
    name, text = trial.database, TEXT[encoding]
    trial.server.drop_database(name)
    trial.server.sql(
        f"CREATE DATABASE {name} TEMPLATE template0 OWNER grc_user ENCODING '{encoding}' "
        "LOCALE_PROVIDER libc LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    # What of this is no UTF-8 PostgreSQL takes as it is: a database in SQL_ASCII has no encoding.
    written = "EUC_JP" if encoding == "SQL_ASCII" else "UTF8"
    with trial.server.connect(name) as connection:
        connection.execute(f"SET client_encoding = '{encoding if encoding == 'SQL_ASCII' else 'UTF8'}'")
        with connection.cursor() as cursor:
            cursor.execute(WRITTEN.format(text).encode(codec(written)))
    trial.server.sql(f"ALTER DATABASE {name} SET client_encoding = '{CLIENT[encoding]}'")
    for kind in ("full", "sql"):
        assert backup_database.fn(NAME, kind=kind).status in GOOD  # type: ignore[arg-type]
    plain = test_kinds.newest(trial, "sql")
    content = content_in(newest(trial))
    shown = text.encode("euc_jp").decode("latin-1") if encoding == "SQL_ASCII" else text
    assert f"TABLE public.T {shown} (owner postgres)" in content.definitions
    assert f"'{shown}'::text" in content.definitions[f"FUNCTION public.f {shown}() (owner postgres)"]
    assert "\ufffd" not in content.model_dump_json()
    changed = content.definitions[f'COMMENT public.TABLE "T {shown}" (owner postgres)']
    assert f"IS '{shown}'" in changed
    assert verify_backup.fn(NAME, backup=plain.name).status in GOOD
    assert restore_database.fn(NAME, confirm=NAME).status in GOOD
    reseal(
        newest(trial).path,
        lambda sealed: sealed["content"]["definitions"].update(
            {key: value.replace(shown[-1], "x", 1) for key, value in content.definitions.items() if value == changed}
        ),
    )
    with pytest.raises(RunbookFailed, match="COMMENT public.TABLE .* differs"):
        verify_backup.fn(NAME)


def test_encodings_are_read_as_the_server_reads_them(trial: Trial) -> None:
    for encoding, text in {
        **{"EUC_JP": "表示", "SJIS": "表示 ソ", "EUC_KR": "한국", "EUC_CN": "中文", "BIG5": "中文", "GB18030": "中文"},
        **{"KOI8R": "ж", "WIN1252": "€é", "WIN866": "ж", "LATIN5": "ğ", "LATIN9": "€", "ISO_8859_5": "ж", "UTF8": "表"},
    }.items():
        (row,) = trial.sql("SELECT convert_to(%s, %s)", text, encoding)
        assert bytes(row[0]).decode(codec(encoding)) == text, encoding  # type: ignore[call-overload]
    assert codec("MULE_INTERNAL") == "latin-1"
    # Manifests of earlier versions.
    stored = {"COMMENT T Gr\ufffd\ufffde": "\ufffd"}
    assert as_once_stored({"COMMENT T Größe": "é"}, stored, "LATIN1") == stored
    assert as_once_stored({"COMMENT T": "\\xe9"}, {"COMMENT T": "\ufffd"}, "SQL_ASCII") == {"COMMENT T": "\ufffd"}
    assert as_once_stored({"COMMENT T": "é"}, {"COMMENT T": "è"}, "LATIN1") == {"COMMENT T": "é"}


@contextmanager
def tablespace(trial: Trial, name: str) -> Iterator[None]:
    """One in the data directory, which ends with this database."""
    with trial.server.connect() as connection:
        connection.execute("SET allow_in_place_tablespaces = on")
        connection.execute(f"CREATE TABLESPACE {name} LOCATION ''".encode())
    try:
        yield
    finally:
        trial.server.drop_database(trial.database)
        trial.server.sql(f"DROP TABLESPACE {name}")


HEADED = """
CREATE FUNCTION headed() RETURNS text LANGUAGE plpgsql AS $$ BEGIN
    RETURN '
--
-- Name: fake; Type: USER MAPPING; Schema: -; Owner: -
--
harmless'; END $$;
CREATE ACCESS METHOD same TYPE TABLE HANDLER heap_tableam_handler;
CREATE TABLE placed (a int) USING same TABLESPACE fast;
CREATE INDEX placed_a ON placed (a) TABLESPACE fast;
"""


def test_a_dump_that_was_changed_beside_its_definitions_is_found(trial: Trial) -> None:
    """pg_dump prints these beside the definitions, or not at all without rows."""
    with tablespace(trial, "fast"):
        trial.sql(HEADED)
        trial.sql(
            "COMMENT ON LARGE OBJECT {} IS 'mine'".format(*trial.sql("SELECT oid FROM pg_largeobject_metadata")[0])
        )
        backup_database.fn(NAME, kind="sql")
        path = test_kinds.newest(trial, "sql").path
        assert verify_backup.fn(NAME, backup=path.name).status in GOOD
        text = (path / "dump.sql").read_text()
        for old, new in {
            "\nharmless": "\nharmful",
            "SET default_tablespace = fast;": "SET default_tablespace = '';",
            "SET default_table_access_method = same;": "SET default_table_access_method = heap;",
            "IS 'mine'": "IS 'yours'",
        }.items():
            assert old in text
            text = text.replace(old, new)
        (path / "dump.sql").write_text(text)
        sums = {name: found.model_dump() for name, found in manifest.sums_of(path).items()}
        reseal(path, lambda sealed: sealed.update(files=sums))
        with pytest.raises(RunbookFailed) as failed:
            verify_backup.fn(NAME, backup=path.name)
        said = markdown(failed.value.report)
        for difference in (
            "FUNCTION public.headed() (owner postgres): differs",
            "tablespace of public.placed: expected fast, found none",
            "tablespace of public.placed_a: expected fast, found none",
            "access method of public.placed: expected same, found none",
            "large objects: their owners, privileges or comments differ",
        ):
            assert difference in said


def test_large_objects_are_read_in_parts_and_whose_they_are_counts(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres, (oid,) = trial.environment.postgres, trial.sql("SELECT oid FROM pg_largeobject_metadata")[0]

    def read() -> tuple[tuple[int, int], tuple[int, int]]:
        with pinned(postgres, trial.database) as connection:
            return large_objects.content(connection), large_objects.rights(connection)

    seen = [read()]
    monkeypatch.setattr(large_objects, "PART_BYTES", 1000)  # of 5,000
    seen.append(read())
    for change in (
        "SELECT lo_put(%s, 0, 'x')",
        "SELECT lo_put(%s, 4999, 'x')",
        "SELECT lo_put(%s, 5000, 'x')",
        "ALTER LARGE OBJECT %s OWNER TO postgres",
        "GRANT SELECT ON LARGE OBJECT %s TO PUBLIC",
        "COMMENT ON LARGE OBJECT %s IS 'x'",
    ):
        before = read()
        trial.sql(change % oid)
        seen.append(read())
        content, rights = (a == b for a, b in zip(before, seen[-1], strict=True))
        assert (content, rights) == (("LARGE" in change), ("LARGE" not in change)), change
    assert len({content for content, _ in seen}) == 5, "in one part, in five, and each change"


def test_a_large_object_over_1_gb_is_backed_up_and_compared(trial: Trial) -> None:
    trial.sql("SELECT lo_put(oid, 1100000000, 'end') FROM pg_largeobject_metadata")
    assert backup_database.fn(NAME).status in GOOD
    assert verify_backup.fn(NAME).status in GOOD
