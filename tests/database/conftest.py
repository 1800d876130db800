"""An environment over a test server, written as the TOML that an operator would write, and a database hard to restore."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyrage import x25519

from blocks.config import toml
from blocks.environment import Environment
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer
from tests.s3.servers import SECRET_KEY

NAME = "trial"
SUITES = toml.DIRECTORY / "expectations" / "interview"
OPERATIONS, ESCROWED = x25519.Identity.generate(), x25519.Identity.generate()


@dataclass(frozen=True)
class Trial:
    """One database on the session's server, and its environment."""

    server: PostgresServer
    database: str
    store: Path
    reports: Path

    @property
    def environment(self) -> Environment:
        return toml.environment(NAME)

    def sql(self, statement: str, *parameters: object, database: str = "") -> list[tuple[object, ...]]:
        return self.server.sql(statement, *parameters, database=database or self.database)

    def oid(self) -> object:
        rows = self.server.sql("SELECT oid FROM pg_database WHERE datname = %s", self.database)
        return rows[0][0] if rows else None

    def databases(self) -> list[str]:
        statement = "SELECT datname FROM pg_database WHERE datname NOT IN ('template0', 'template1') ORDER BY 1"
        return [row[0] for row in self.server.sql(statement)]


TOML = """
name = "trial"
timezone = "Asia/Tokyo"
reports = "{reports}"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
"backup.gap_seconds" = [3600, 86400]
[postgres]
port = {port}
database = {database}
user = "grc_user"
password_env = "TRIAL_PASSWORD"
admin_password_env = "TRIAL_ADMIN_PASSWORD"
programs = "{programs}"
data_directory = "{data}"
os_user = "{user}"
pool_applications = ["grc_backend"]
[services]
kind = "supervisor"
names = {{}}
[backups]
postgres = "{store}/postgresql"
redis = "{store}/redis"
files = "{store}/files"
cluster = "{store}/cluster"
wal = "{store}/wal"
spool = "{store}/spool"
[logs]
backup = "{store}/db_backup.log"
"""


def write_environment(server: PostgresServer, database: str, directory: Path) -> Path:
    path = directory / "trial.toml"
    path.write_text(
        TOML.format(
            reports=directory / "reports",
            port=server.port,
            database=json.dumps(database, ensure_ascii=False),
            programs=server.programs,
            data=server.data,
            user=server.account.name,
            store=directory / "backups",
        )
    )
    return path


def with_expectations(directory: Path, suites: Path = SUITES) -> None:
    """From now on the environment that `write_environment` wrote there has the suites of the interview schema."""
    path = directory / "trial.toml"
    path.write_text(f'{path.read_text()}[expectations]\ndirectory = "{suites}"\n')


@pytest.fixture
def trial(
    postgres_server: PostgresServer, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Trial]:
    """A database `trial_<test>` filled by HARD; everything named after it is dropped afterwards."""
    database = getattr(request, "param", f"trial_{abs(hash(request.node.name)) % 10**8}")
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(postgres_server, database, tmp_path)))
    monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
    monkeypatch.setenv("TRIAL_S3_SECRET", SECRET_KEY)
    monkeypatch.setenv("TRIAL_IDENTITY", str(OPERATIONS))
    if not postgres_server.is_running:  # a test that killed it failed before it was started again
        postgres_server.start()
    postgres_server.create_database(database)
    made = Trial(postgres_server, database, tmp_path / "backups" / "postgresql", tmp_path / "reports")
    made.sql(HARD)
    yield made
    if not postgres_server.is_running:
        postgres_server.start()
    for name in made.databases():
        if name.startswith(database[:30]):
            postgres_server.drop_database(name)


# Table names with spaces and capitals, empty tables, json, arrays, ranges, enums, domains, views, materialised views,
# large objects, partitions (by hash of an enum too), identity, generated and citext-like columns, policies, triggers.
HARD = """
SET ROLE grc_user;
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE DOMAIN percent AS numeric(5, 2) CHECK (VALUE BETWEEN 0 AND 100);
CREATE TABLE people (
    id bigserial PRIMARY KEY, name text NOT NULL, mood mood, share percent, status varchar(10) DEFAULT 'new',
    born date, span tstzrange, tags text[], doc json, data jsonb, raw bytea, place point, bits bit(4), price money,
    search tsvector, wait interval, half real, kind regclass, t text,
    shout text GENERATED ALWAYS AS (upper(name)) STORED,
    CONSTRAINT people_status CHECK (status IN ('new', 'old')));
CREATE INDEX people_name ON people (name);
CREATE INDEX people_mood ON people (mood) WHERE mood IS NOT NULL;
INSERT INTO people (name, mood, share, born, span, tags, doc, data, raw, place, bits, price, search, wait, half, kind, t)
SELECT '候補者 ' || g, (ARRAY['sad', 'ok', 'happy'])[1 + g % 3]::mood, g % 100, date '2000-01-01' + g,
       tstzrange(timestamptz '2026-01-01 09:00+09', timestamptz '2026-01-01 09:00+09' + g * interval '1 minute'),
       ARRAY['a', NULL, 'b,"c"'], json_build_object('z', g, 'a', 1.50), jsonb_build_object('g', g), decode('00ff', 'hex'),
       point(g, -g), B'1010', g::money, to_tsvector('simple', 'x ' || g), interval '1 mon' * g, g / 3.0, 'people', 'row'
FROM generate_series(1, 2000) g;
CREATE TABLE "Empty Table" ("Key Column" int PRIMARY KEY);
CREATE TABLE "Über tisch; DROP" (id int GENERATED BY DEFAULT AS IDENTITY, "SELECT" text);
INSERT INTO "Über tisch; DROP" ("SELECT") SELECT repeat('x', g) FROM generate_series(1, 50) g;
CREATE TABLE answers (person bigint REFERENCES people, at timestamptz NOT NULL, body text) PARTITION BY RANGE (at);
CREATE TABLE answers_2026_01 PARTITION OF answers FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE answers_rest PARTITION OF answers DEFAULT;
INSERT INTO answers SELECT 1 + g % 2000, timestamptz '2026-01-20' + g * interval '1 hour', 'b' || g
FROM generate_series(1, 500) g;
CREATE TABLE by_mood (mood mood, n int) PARTITION BY HASH (mood);
CREATE TABLE by_mood_0 PARTITION OF by_mood FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE by_mood_1 PARTITION OF by_mood FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO by_mood SELECT (ARRAY['sad', 'ok', 'happy'])[1 + g % 3]::mood, g FROM generate_series(1, 300) g;
CREATE TABLE notes (id int);
CREATE TABLE long_notes (body text) INHERITS (notes);
ALTER TABLE notes ADD COLUMN at date;
INSERT INTO long_notes VALUES (1, 'a restore puts the column at before body', '2026-01-01'), (2, NULL, NULL);
CREATE TABLE rules (a boolean, b boolean, c boolean, label text DEFAULT 'a b',
    CONSTRAINT grouped CHECK ((a OR b) AND c));
CREATE VIEW happy AS SELECT id, name FROM people WHERE mood = 'happy' AND status IN ('new', 'old');
CREATE MATERIALIZED VIEW moods AS SELECT mood, count(*) FROM people GROUP BY mood;
CREATE MATERIALIZED VIEW unfilled AS SELECT 1 AS one WITH NO DATA;
CREATE SEQUENCE "Ticket Numbers" START 1000;
SELECT nextval('"Ticket Numbers"');
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.t := 'touched'; RETURN NEW; END $$;
CREATE TRIGGER touch BEFORE UPDATE ON people FOR EACH ROW EXECUTE FUNCTION touch();
ALTER TABLE people ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON people USING (mood = 'happy');
CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);
INSERT INTO alembic_version VALUES ('0004');
SELECT lo_from_bytea(0, decode(repeat('ab', 5000), 'hex'));
RESET ROLE;
DO $$ BEGIN
    EXECUTE 'CREATE EXTENSION ' || (
        SELECT min(name) FROM pg_available_extensions WHERE name IN ('pg_trgm', 'vector')  -- not every wheel has contrib
    );
END $$;
GRANT SELECT ON people TO pg_monitor;
DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET timezone = %L', current_database(), 'Asia/Tokyo');
    EXECUTE format('ALTER DATABASE %I SET search_path = "$user", public', current_database());
    EXECUTE format('ALTER ROLE grc_user IN DATABASE %I SET work_mem = %L', current_database(), '8MB');
    EXECUTE format('REVOKE CONNECT ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('COMMENT ON DATABASE %I IS %L', current_database(), '面接');
END $$;
"""
