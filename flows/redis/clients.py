"""Connections to Redis (§2.4): counted, judged, and the idle ones closed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.pinned import pin_redis
from flows.redis.client_findings import (
    MANUAL_IDLE_SECONDS,
    MOST_ROWS,
    described,
    judge_buffers,
    judge_complete,
    judge_idle,
    judge_places,
    judge_role,
    judge_settings,
    judge_special,
    tell_counts,
)
from flows.redis.master import judge_master
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.redis.client_list import Client
from tasks.redis.clients import Clients, read_clients
from tasks.redis.closing import CLOSE, Closing, close_clients, count_reconnected, find_refusal, why_kept
from tasks.redis.sentinels import read_sentinels

LEAST_SECONDS = 10
RECONNECT_SECONDS = 2.0
# Of a Unix socket: /path:0, or [/path:0]:0.
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[0-9.]+|\[?/\S*):\d{1,5}")


@flow(name="check-redis-clients", flow_run_name="check-redis-clients {environment}")
def check_redis_clients(environment: str) -> Report:
    """接続数管理: 接続数確認・接続数制限設定 (§2.4)

    Counts the connections of the master, in total and by name, address and user, against maxclients (80 % warns, 95 %
    is critical), and shows who is idle, blocked, subscribed or in MONITOR, what their buffers take, who was turned
    away, and the settings that limit them. Run it daily, and first when clients are refused.

    It changes nothing; there is nothing to undo. Evidence: the tables of connections.

    Departs from the manual: lines of CLIENT LIST are not the number that counts (replicas and the asking connection
    count too, and the answer for thousands of clients stops the server for a moment: it is asked for in pieces). Idle
    connections are a pool's normal state: they matter while places are scarce.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check Redis clients", env) as report:
        found = _read(report, env)
        judge_role(report, found, Status.WARN)
        judge_places(report, found)
        judge_special(report, found)
        judge_idle(report, found)
        judge_buffers(report, found)
        judge_settings(report, found)
        tell_counts(report, found)
        report.outcome = f"{found.connected + found.replicas:,} of {found.most:,} connections are in use"
    return report


@flow(name="close-idle-redis-clients", flow_run_name="close-idle-redis-clients {environment}")
def close_idle_redis_clients(
    environment: str,
    min_seconds: Annotated[int, Field(ge=LEAST_SECONDS)] = MANUAL_IDLE_SECONDS,
    address: str = "",
    client_id: Annotated[int, Field(ge=0)] = 0,
    keep_names: tuple[str, ...] = (),
    keep_users: tuple[str, ...] = (),
    keep_addresses: tuple[str, ...] = (),
    master: str = "",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """接続数管理: アイドル接続の切断 (§2.4)

    Closes the master's connections that have been idle for `min_seconds`, or the one of `address`, idle or not. Run it
    when check-redis-clients finds that places are scarce. Each is looked at again right before it is closed, and is
    named by its id in the call: one that works again, or another one at its address, is left alone. The plan of an
    `address` says its id as `client_id`: with that, nobody who has the address by then is closed in its place.

    A client that is closed gets an error at its next command, and connects again if its library does: what it had in a
    MULTI (the plan shows it) or under WATCH is gone, no data is. It cannot be undone. Replicas, masters, Sentinels,
    pub/sub, blocked and MONITOR clients, those with client tracking and these runbooks' own are kept. Evidence: what
    was closed and kept, and why; how many came back.

    Departs from the manual: `idle=[3-9][0-9][0-9][0-9]` misses 10,000 s and more and takes 3000 to 3599 too: here
    idle times are numbers. CLIENT KILL by address may meet a later connection of that address: here it is by id.

    Args:
        environment: 対象の環境
        min_seconds: この秒数以上アイドルの接続だけを対象にする
        address: 特定の接続だけを対象にする (ip:port)。空なら min_seconds で選ぶ
        client_id: address の接続のID (計画が示す)。0 なら現在そのアドレスにある接続
        keep_names: 切断しない接続名 (CLIENT SETNAME) の一覧。空でもよい
        keep_users: 切断しないACLユーザーの一覧。空でもよい
        keep_addresses: 切断しないアドレス (ip または ip:port) の一覧。空でもよい
        master: 過半数のSentinelがマスターを示さないときだけ、マスターと確認したサーバーの host:port。通常は空
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Close idle Redis clients", env, confirm, plan, changes=True) as report:
        _require_sense(min_seconds, address, client_id)
        found = _read(report, env, changes=True, waiver=master)
        judge_role(report, found, Status.CRITICAL)
        report.fail_if_critical()
        if address:
            wanted, seconds = [_at(report, found, address, client_id)], 0
        else:
            wanted, seconds = [one for one in found.clients if one.idle_seconds >= min_seconds], min_seconds
        chosen = _choose(report, found, wanted, (keep_names, keep_users, keep_addresses), named=bool(address))
        if not chosen:
            report.outcome = "there is nothing to close"
            return report
        block = env.redis.at(found.address)
        if refusal := find_refusal(block):
            raise refusal
        for one in chosen:
            report.plan("close", described(one))
        pin_redis(report, block)
        permit = report.permit(*(Act(CLOSE, f"{one.target} at {found.address}") for one in chosen))
        done = close_clients(permit, block, found, chosen, seconds)
        _tell_done(report, done, len(chosen))
        wait = count_reconnected.after(done)
        back = wait(block, found.newest_id, done.closed, RECONNECT_SECONDS) if done.closed else 0
        report.fact("reconnected", f"{back} of {len(done.closed)} within {RECONNECT_SECONDS:.0f} s")
        report.outcome = f"{len(done.closed)} of {len(chosen)} connections closed, {back} of them connected again"
    return report


def _read(report: Report, env: Environment, *, changes: bool = False, waiver: str = "") -> Clients:
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=changes, waiver=waiver)
    found = read_clients(block)
    report.fact("server", f"{found.address} ({found.role}, {found.version})")
    judge_complete(report, found)
    return found


def _require_sense(min_seconds: int, address: str, client_id: int) -> None:
    if min_seconds < LEAST_SECONDS:
        raise OpsError(f"min_seconds is {min_seconds}", f"choose {LEAST_SECONDS} or more: clients pause that long")
    if address and not _ADDRESS.fullmatch(address):
        raise OpsError(f"“{address[:60]}” is no address of a client", "write ip:port, as check-redis-clients shows it")
    if client_id and not address:
        raise OpsError(
            f"client_id is {client_id} and there is no address", "give its address too: after a restart ids begin anew"
        )


def _at(report: Report, found: Clients, address: str, client_id: int) -> Client:
    """The one connection that is meant; the plan's form names it by its id too."""
    there = [one for one in found.clients if one.address == address]
    meant = [one for one in there if client_id in (0, one.id)]
    ids = ", ".join(str(one.id) for one in there[:MOST_ROWS])
    if not there:
        raise OpsError(f"no client of {found.address} has the address {address}", "look again: check-redis-clients")
    if not meant:
        hint = "plan again with client_id=0, and look at what it shows"
        raise OpsError(f"client {client_id} is gone, and {address} is another one's ({ids}) now", hint)
    if len(meant) > 1:
        raise OpsError(f"{len(there)} clients have the address {address}", f"choose one by client_id: {ids}")
    report.pin("client_id", meant[0].id)
    return meant[0]


def _choose(
    report: Report,
    found: Clients,
    wanted: Sequence[Client],
    kept: tuple[Sequence[str], Sequence[str], Sequence[str]],
    *,
    named: bool,
) -> list[Client]:
    """What is to be closed, the longest idle first; what is kept is told with the reason."""
    judged = [(one, why_kept(one, *kept)) for one in sorted(wanted, key=lambda one: -one.idle_seconds)]
    held = [(described(one), why) for one, why in judged if why]
    if held:
        report.table("Kept", ("connection", "why"), held[:MOST_ROWS] + _more(len(held)))
    if named and held:
        hint = f"if it must go all the same: CLIENT KILL ID {wanted[0].id} on {found.address}"
        report.warn("kept", hint, value=f"{held[0][0]}: {held[0][1]}", expected="a client that only sends commands")
    return [one for one, why in judged if not why]


def _tell_done(report: Report, done: Closing, wanted: int) -> None:
    """What became of each.

    Raises:
        OpsError: it was stopped before the last.
    """
    rows = [(described(item.client), item.why) for item in done.done[:MOST_ROWS]]
    report.table("Closed", ("connection", "result"), rows + _more(len(done.done)))
    if stopped := done.stopped:
        what = f"while clients were closed: {stopped.message}; {len(done.closed)} of {wanted} are closed"
        raise OpsError(what, stopped.hint or "launch it again: it looks anew")
    moved = next((item.why for item in done.done if "the server is a" in item.why), "")
    if moved:
        report.warn("the master changed meanwhile", "launch it again: the master is found anew", value=moved)


def _more(count: int) -> list[tuple[str, str]]:
    return [(f"… {count - MOST_ROWS} more", "")] if count > MOST_ROWS else []
