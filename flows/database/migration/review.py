"""A new migration: a scratch database to generate it, its rehearsal, and its review (§1.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from blocks.environment import Environment
from flows.database.migration.rehearsal import CHECK_SERVER, drop_scratch
from runbook.errors import OpsError
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from tasks.migrations.program import require_reached
from tasks.migrations.rehearsal import Direction, compare_schemas, migrate_rehearsal, read_state
from tasks.migrations.scratch import create_rehearsal
from tasks.migrations.scripts import MigrationHeads, Script

MOST_LINES = 200
# Changes that autogenerate misses or gets wrong, and a pattern for the lines of a script that may have them.
# https://alembic.sqlalchemy.org/en/latest/autogenerate.html#what-does-autogenerate-detect-and-what-does-it-not-detect
CHECKLIST = (
    (
        "名前の変更",
        "テーブル・列の改名は drop + add になる → op.rename_table / alter_column(new_column_name=) に直す",
        r"op\.(drop_table|drop_column|batch_alter)|\bDROP (TABLE|COLUMN)\b",
    ),
    (
        "型とサーバー側デフォルト",
        "compare_type / compare_server_default の設定次第で検出されない。USING 句も必要か確認",
        r"type_=|server_default|postgresql_using|\bTYPE\b",
    ),
    (
        "ENUM の値",
        "値の変更は検出されない。downgrade で型を DROP するか。新しい値を同じトランザクションで使わないか",
        r"Enum\(|\bENUM\b|ADD VALUE",
    ),
    (
        "CHECK・EXCLUDE 制約",
        "検出されない。手で書く。名前のない制約は downgrade で消せない",
        r"check_constraint|CheckConstraint|\bCHECK\b|\bEXCLUDE\b|constraint\(None",
    ),
    (
        "部分・式インデックス",
        "条件 (WHERE) と式の変更は検出されないことがある",
        r"postgresql_where|sa\.text\(|literal_column",
    ),
    (
        "ビュー・関数・トリガー・権限",
        "検出されない。依存するビューがあると列の変更は失敗する",
        r"\b(VIEW|FUNCTION|TRIGGER|GRANT|POLICY|SEQUENCE)\b",
    ),
    (
        "データの移行",
        "検出されない。大きな UPDATE はバッチに分ける。再実行しても同じ結果か",
        r"\b(UPDATE|INSERT|DELETE)\b|bulk_insert",
    ),
    (
        "NOT NULL の追加",
        "NULL の行があると失敗する。大きなテーブルは CHECK NOT VALID → VALIDATE → SET NOT NULL",
        r"nullable=False|NOT NULL",
    ),
    (
        "インデックスの作成",
        "CREATE INDEX は書き込みを止める。大きなテーブルは autocommit_block の中で CONCURRENTLY",
        r"create_index|CREATE (UNIQUE )?INDEX",
    ),
    (
        "外部キー・制約の追加",
        "両方のテーブルをロックする。NOT VALID で追加し、次のマイグレーションで VALIDATE",
        r"create_foreign_key|ForeignKey|ADD CONSTRAINT",
    ),
    ("ロックの影響", "check-migrations (rehearse=true) の表: どのテーブルを何秒ロックするか", r"op\.alter|ALTER TABLE"),
    ("downgrade", "upgrade のすべてを逆順に戻すか。失われるデータは何か", r"def downgrade"),
)


@contextmanager
def scratch_at(report: Report, env: Environment, revision: str) -> Iterator[str]:
    """An empty database, migrated to a revision, to compare the models with.

    Raises:
        RunbookFailed: the migrations do not run on an empty database.
    """
    try:
        name = create_rehearsal(env.postgres)
        require_reached(env.postgres, env.application, name)
        if revision:
            came = migrate_rehearsal(env.postgres, env.application, name, "up", revision)
            report.require(
                "migrations of an empty database",
                not came.error,
                "correct the migration that fails: an empty database cannot be migrated to head",
                value=came.error or f"up to {revision}",
                expected="they run on an empty database",
            )
            report.fail_if_critical()
        yield name
    except psycopg.Error as error:
        what = str(error).splitlines()[0]
        raise OpsError(f"connection to the scratch database lost: {what}", CHECK_SERVER) from None
    finally:
        drop_scratch(report, env)


def find_unfinished(heads: MigrationHeads, applied: set[str], message: str) -> Script | None:
    """The script that an earlier run created for the same message and that is not applied here."""
    for script in heads.scripts:
        if script.revision in heads.names and script.revision not in applied and script.title.strip() == message:
            return script
    return None


def rehearse_new(report: Report, env: Environment, scratch: str, script: Script) -> None:
    """Up, down, up on the empty scratch database: the downgrade must restore the schema."""
    before = next(iter(script.down), "")
    start = read_state(env.postgres, scratch)
    steps: tuple[tuple[Direction, str], ...] = (("up", script.revision), ("down", before), ("up", script.revision))
    for number, (direction, target) in enumerate(steps, 1):
        done = migrate_rehearsal(env.postgres, env.application, scratch, direction, target)
        _require(report, f"rehearsal: {number}. {direction}", not done.error, script, done.error or "done")
        if done.error:
            return
        if direction == "down":
            now = read_state.after(done)(env.postgres, scratch)
            other = compare_schemas.after(now)(env.postgres, scratch, start.definitions, now.definitions)
            _require(report, "schema after up and down", not other, script, "; ".join(other[:3]) or "as before")


def judge_new(report: Report, script: Script, *, generated: bool) -> None:
    """The review: the script, and a checklist of what autogenerate may have missed."""
    text = script.path.read_text(encoding="utf-8", errors="replace")
    report.fact("file", script.path)
    report.fact("revision", f"{script.revision}, after {', '.join(script.down) or 'nothing'}")
    _require(report, "upgrade", script.upgrade == "written", script, script.upgrade)
    _require(report, "downgrade", script.downgrade == "written", script, script.downgrade)
    report.table(
        "レビュー項目 (autogenerate が見落とすもの)",
        ("項目", "確認すること", "このファイルでは"),
        [(item, what, _places(pattern, text)) for item, what, pattern in CHECKLIST],
    )
    lines = text.splitlines()
    more = f"\n… {len(lines) - MOST_LINES} more lines" if lines[MOST_LINES:] else ""
    shown = "\n".join(lines[:MOST_LINES]) + more
    report.attach(Evidence(script.path.name, text=fenced(shown, "python")))
    if generated:
        report.warn(
            "review",
            f"review {script.path} by the checklist, correct it, run this again with the same message, commit it",
            value="generated, not yet reviewed",
        )


def _require(report: Report, name: str, ok: bool, script: Script, value: str) -> None:
    report.require(
        name,
        ok,
        f"write upgrade() and downgrade() in {script.path}, then run this again with the same message",
        value=value,
        expected="written, and undone by the downgrade",
    )


def _places(pattern: str, text: str) -> str:
    lines = [number for number, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]
    shown = ", ".join(map(str, lines[:6])) + (" …" if lines[6:] else "")
    return f"{len(lines)} か所 (行 {shown})" if lines else "—"
