"""Clearing caches in Redis (§2.2)."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.pinned import pin_keys, pin_redis
from flows.redis.cache.clearing import (
    Flushing,
    Wanted,
    count,
    flush_wanted,
    flushes_of,
    judge_rights,
    judge_server,
    plan_flush,
    plan_unlink,
    tell_undo,
    unlink_wanted,
)
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.run import runbook
from tasks.redis.cache.clearing import UNLINK, Order
from tasks.redis.cache.flushing import FLUSHING
from tasks.redis.cache.server import require_databases


@flow(name="clear-cache", flow_run_name="clear-cache {environment}")
def clear_cache(
    environment: str,
    prefixes: tuple[str, ...] = (),
    pattern: str = "",
    databases: tuple[Annotated[int, Field(ge=0)], ...] = (0,),
    all_databases: bool = False,
    only_without_ttl: bool = False,
    flush: Flushing = "",
    include_protected: tuple[str, ...] = (),
    keys_per_second: Annotated[int, Field(ge=0)] = 0,
    expected_keys: Annotated[int, Field(ge=0)] = 0,
    master: str = "",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """キャッシュクリア手順 (§2.2)

    Unlinks the keys of some prefixes, or those that a pattern matches, page by page; or flushes whole databases. Run it
    when a cache serves stale values or takes the memory. With an empty confirm it counts the keys and their bytes by
    prefix, shows the first 20 and changes nothing. Bytes are those of a sample where there are more than 20,000 keys.

    What it changes: the keys are gone, also on the replicas; big values are freed in the background. Keys of
    protected_prefixes are left out and counted, unless a prefix or the pattern's own beginning names
    them, or include_protected does; a flush is refused while there are any. A flush, only_without_ttl, protected keys
    and a pattern without a beginning (`*`) need expected_keys too: the number that the plan showed. 10 % more than that
    is refused, and a clearing stops there; for a flush also 10 % less. A protected key that is made in the moment
    between the last look and a flush goes with it. Killed or stopped anywhere, launched again it takes what is left.
    It ends where the server is restarted, demoted or replaced meanwhile, and begins only where a majority of the
    Sentinels names it. Its reads count in the server's statistics (keyspace_hits).

    Undo: none, the application makes a cache anew; where keys without a TTL may go, it names the newest backup.
    Evidence: keys and bytes by prefix, memory before and after, and the keys that are there again.

    Departs from the manual: one call for a page instead of a process for a key, UNLINK instead of DEL, any name is
    safe; “deleting expired keys” by TTL -1 deletes those that are to *stay*: here under named prefixes only, and
    checked in the very call that unlinks.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        prefixes: 削除するキーの接頭辞 (文字どおり。バイトは \\xNN)。例 cache:。pattern、flush とのどれか一つが必須
        pattern: 接頭辞の代わりに、Redisのglobパターン。例 cache:user:?*:page。空なら prefixes か flush に従う
        databases: 対象のデータベース番号
        all_databases: キーのある全データベースを対象にする
        only_without_ttl: TTLのないキーだけを削除する (接頭辞の指定が必要)
        flush: データベース全体の消去。database は databases のみ (FLUSHDB ASYNC)、all は全部 (FLUSHALL ASYNC)。空はなし
        include_protected: 削除してもよい保護接頭辞。例 session:。空なら保護されたキーは残す
        keys_per_second: 1秒あたりの最大削除数。0 は制限なし (1回の呼び出しは常に短い)
        expected_keys: 計画が示すキー数 (±10 %)。flush、only_without_ttl、保護キー、先頭のないパターン (*) では必須
        master: 過半数のSentinelがマスターを示さないときだけ、マスターと確認したサーバーの host:port。通常は空
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 実行するには環境名を入力。空なら計画のみ表示
    """
    env = Environment.find(environment)
    with runbook("Clear cache", env, confirm, plan, changes=True) as report:
        wanted = Wanted(
            tuple(env.redis.protected_prefixes),
            prefixes,
            pattern,
            databases,
            all_databases,
            only_without_ttl,
            flush,
            include_protected,
        )
        wanted.require_sense()
        server = judge_server(report, env, master)
        numbers = wanted.numbers(server)
        require_databases(env.redis.at(server.address), numbers)
        # Without a plan to compare with, the pages count what they unlink.
        counted = not confirm or bool(plan) or wanted.is_broad or expected_keys > 0
        found = count(report, env, wanted, server, numbers, expected_keys) if counted else None
        planned, waived = found.keys if found else -1, bool(master)
        order = Order(wanted.selection(), numbers, server, planned, keys_per_second, waived)
        flushes = flushes_of(wanted, server, numbers, waived) if wanted.flush else ()
        if not (flushes if wanted.flush else order.planned):
            nothing = "flush: no key" if wanted.flush else f"clear: no {order.selection.told}"
            report.outcome = f"there is nothing to {nothing} in {order.where}"
            return report
        if found:
            judge_rights(report, env, order, found, flushes)
        tell_undo(report, env, wanted, server, numbers)
        if wanted.flush:
            plan_flush(report, flushes)
        elif found:
            plan_unlink(report, order, found)
        pin_redis(report, env.redis.at(server.address))
        if found:
            pin_keys(report, order.where, sum(each.keys for each in flushes) if wanted.flush else found.keys)
        acts = [Act(FLUSHING, each.target) for each in flushes] if wanted.flush else [Act(UNLINK, order.target)]
        permit = report.permit(*acts)
        if wanted.flush:
            flush_wanted(report, permit, env, flushes)
        else:
            unlink_wanted(report, permit, env, order, wanted)
    return report
