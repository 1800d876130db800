"""Connections to Redis: check them, and close idle ones (§2.4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.pinned import pin_redis
from flows.redis.client_findings import (
    MANUAL_IDLE_SECONDS,
    described,
    judge_buffers,
    judge_complete,
    judge_idle,
    judge_places,
    judge_role,
    judge_settings,
    judge_special,
    report_counts,
)
from flows.redis.master import judge_master
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted
from tasks.redis.client_list import Client
from tasks.redis.clients import RedisClients, read_clients
from tasks.redis.closing import Closing, close_clients, count_reconnected, find_refusal, why_kept
from tasks.redis.sentinels import read_sentinels

LEAST_SECONDS = 10
RECONNECT_SECONDS = 2.0
MOST_IDS = 50
# A Unix socket's address: /path:0, or [/path:0]:0.
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[0-9.]+|\[?/\S*):\d{1,5}")


@flow(name="check-redis-clients", flow_run_name=RunName("check-redis-clients {environment}"))
def check_redis_clients(environment: str) -> Report:
    """接続数管理: 接続数確認・接続数制限設定 (§2.4)

    Counts the master's connections, in total and by name, address and user, against maxclients (WARN above 80 %,
    CRITICAL above 95 %). It lists idle, blocked, subscribed and MONITOR clients, the memory of their buffers, rejected
    connections, and the settings that limit them. Run it daily, and first if connections are rejected.

    It changes nothing. Undo: nothing to undo. Evidence: the tables of connections.

    Departs from the manual: the number of lines of CLIENT LIST is not the number that maxclients limits: replicas count
    too. For thousands of clients, CLIENT LIST blocks the server for a moment, so the list is read in parts. Idle
    connections are normal in a connection pool. They are a finding only near maxclients.

    Args:
        environment: Environment (lab, staging, production …)
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
        report_counts(report, found)
        report.outcome = f"{found.connected + found.replicas:,} of {found.most:,} connections are in use"
    return report


@flow(name="close-idle-redis-clients", flow_run_name=RunName("close-idle-redis-clients {environment}"))
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

    Closes the master's connections that have been idle for `min_seconds`, or the connection of `address`, even if it is
    active. Run it if check-redis-clients finds too many connections. Each connection is checked again immediately
    before it is closed, and closed by its id: a client that is active again, or a later one with its address, is kept.
    The plan of an `address` fills in its id as `client_id`.

    A closed client gets an error at its next command, and reconnects if its library does. It loses an open MULTI (the
    plan shows it) or WATCH, but no data. Undo: none. Replicas, masters, Sentinels, pub/sub, blocked and MONITOR
    clients, those with client tracking and these runbooks' own are kept. Evidence: closed and kept connections, why,
    and how many reconnected.

    Departs from the manual: `idle=[3-9][0-9][0-9][0-9]` misses 10,000 s and more, and matches 3000 to 3599. Here idle
    times are compared as numbers. CLIENT KILL by address can close a later connection of that address; here it is by
    id.

    Args:
        environment: Environment (lab, staging, production …)
        min_seconds: Only connections that have been idle at least this long, in seconds
        address: Only this connection (ip:port). Empty: choose by min_seconds
        client_id: ID of the connection at address (the plan shows it). 0: the connection that is there now
        keep_names: Names to leave connected (CLIENT SETNAME). May be empty
        keep_users: ACL users to leave connected. May be empty
        keep_addresses: Addresses to leave connected (ip or ip:port). May be empty
        master: Only if no quorum of Sentinels names the master: host:port of the server that you verified as master.
            Usually empty
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
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
        closing = Change(
            close_clients.bind(block, found, chosen, seconds),
            "close",
            described(chosen[0]),
            more=[PlannedStep("close", described(one)) for one in chosen[1:]],
            pins=[lambda report: pin_redis(report, block)],
        )
        effect = Effect(f"closes {counted(len(chosen), 'connection')} to Redis", "not needed, clients connect again")
        with carrying_out(report, closing, effect=effect) as carry:
            done = carry(closing)
        _report_closed(report, done, len(chosen))
        count = count_reconnected.after(done)
        again = count(block, found.newest_id, done.closed, RECONNECT_SECONDS) if done.closed else 0
        report.fact("reconnected", f"{again} of {len(done.closed)} within {RECONNECT_SECONDS:.0f} s")
        report.outcome = f"{len(done.closed)} of {len(chosen)} connections closed, {again} of them reconnected"
    return report


def _read(report: Report, env: Environment, *, changes: bool = False, waiver: str = "") -> RedisClients:
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=changes, waiver=waiver)
    found = read_clients(block)
    report.fact("server", f"{found.address} ({found.role}, {found.version})")
    judge_complete(report, found)
    return found


def _require_sense(min_seconds: int, address: str, client_id: int) -> None:
    if min_seconds < LEAST_SECONDS:
        raise OpsError(f"min_seconds is {min_seconds}", f"choose {LEAST_SECONDS} or more: shorter pauses are normal")
    if address and not _ADDRESS.fullmatch(address):
        raise OpsError(f"“{address[:60]}” is no client's address", "write ip:port, as check-redis-clients lists it")
    if client_id and not address:
        raise OpsError(f"client_id is {client_id}, but address is empty", "add its address: a restart reuses ids")


def _at(report: Report, found: RedisClients, address: str, client_id: int) -> Client:
    """The connection of an address. The plan's form also fills in its id."""
    found_there = [one for one in found.clients if one.address == address]
    wanted = [one for one in found_there if client_id in (0, one.id)]
    ids = ", ".join(str(one.id) for one in found_there[:MOST_IDS])
    if not found_there:
        raise OpsError(f"no client of {found.address} has the address {address}", "list them: check-redis-clients")
    if not wanted:
        hint = "plan again with client_id=0, and check the new plan"
        raise OpsError(f"client {client_id} has disconnected; {address} now belongs to client {ids}", hint)
    if len(wanted) > 1:
        raise OpsError(f"{len(wanted)} clients have the address {address}", f"choose one by client_id: {ids}")
    report.pin("client_id", wanted[0].id)
    return wanted[0]


def _choose(
    report: Report,
    found: RedisClients,
    wanted: Sequence[Client],
    kept: tuple[Sequence[str], Sequence[str], Sequence[str]],
    *,
    named: bool,
) -> list[Client]:
    """The connections to close, the longest idle first; the report lists the kept ones with the reason."""
    judged = [(one, why_kept(one, *kept)) for one in sorted(wanted, key=lambda one: -one.idle_seconds)]
    kept_rows = [(described(one), why) for one, why in judged if why]
    if kept_rows:
        report.table("Kept", ("connection", "why"), kept_rows, most=50)
    if named and kept_rows:
        hint = f"to close it nevertheless: CLIENT KILL ID {wanted[0].id} on {found.address}"
        report.warn("kept", hint, value=": ".join(kept_rows[0]), expected="a client that only sends commands")
    return [one for one, why in judged if not why]


def _report_closed(report: Report, done: Closing, wanted: int) -> None:
    """The result for each connection.

    Raises:
        OpsError: an error stopped it before the last one.
    """
    report.table("Closed", ("connection", "result"), [(described(one.client), one.why) for one in done.done], most=50)
    if stopped := done.stopped:
        what = f"while clients were closed: {stopped.message}; {len(done.closed)} of {wanted} are closed"
        raise OpsError(what, stopped.hint or "run it again")
    moved = next((item.why for item in done.done if "the server is a" in item.why), "")
    if moved:
        report.warn("the master changed meanwhile", "run it again: it finds the new master", value=moved)
