"""The flows' titles begin with the manual's own headings, so that whoever knows the manual finds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from flows.database import migrations
from flows.database.server import connections, settings
from flows.database.upkeep import indexes, vacuum

HEADINGS = {
    migrations.check_migrations: "マイグレーションの適用",
    migrations.apply_migrations: "マイグレーションの適用",
    migrations.rollback_migrations: "マイグレーションのロールバック",
    migrations.create_migration: "新規マイグレーションの作成",
    vacuum.vacuum_database: "手動VACUUM実行",
    vacuum.check_autovacuum: "自動VACUUM設定確認",
    indexes.check_indexes: "インデックス状態確認",
    indexes.rebuild_indexes: "インデックス再構築",
    connections.check_pool_settings: "asyncpgプール設定",
    connections.check_connections: "PostgreSQL側の接続数設定",
    connections.close_idle_connections: "PostgreSQL側の接続数設定",
    settings.check_postgres_settings: "postgresql.conf推奨設定",
    settings.apply_postgres_settings: "postgresql.conf推奨設定",
    settings.undo_postgres_settings: "postgresql.conf推奨設定",
}


@pytest.mark.parametrize(("fn", "heading"), [(flow.fn, text) for flow, text in HEADINGS.items()])
def test_a_title_begins_with_the_manual_s_heading(fn: Callable[..., object], heading: str) -> None:
    assert (inspect.getdoc(fn) or "").startswith(heading)
