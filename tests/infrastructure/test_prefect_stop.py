"""A failed swap of Prefect's database: what is reported of it, and whether the services are started again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from pydantic import SecretStr

from blocks.environment import Environment
from blocks.prefect_server import PrefectServer
from blocks.services.service import DockerServices
from flows.infrastructure.prefect import restore
from flows.infrastructure.prefect.restore import StoppedPrefect
from runbook.change import Change, State, carrying_out
from runbook.current import use_report
from runbook.errors import OpsError
from runbook.guard.effect import Effect
from runbook.report import Report
from tasks.postgres.restore.swap import SwapUnknown

SEEN_AT_SWAP = State("as the swap reports it", "start the server")


def raising(error: BaseException) -> Callable[[object, object], NoReturn]:
    def work(_guard: object, _copy: object) -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "told", "started"),
    [
        (OpsError("it was locked"), "Prefect's database was not replaced; its services run again", True),
        (SwapUnknown("the session was lost", ""), SEEN_AT_SWAP.what, False),
        (KeyboardInterrupt(), "the swap was interrupted: Prefect's restored database is live, or nothing was", True),
    ],
    ids=["failed", "unknown", "interrupted"],
)
def test_a_failed_swap_reports_what_is_known(
    error: BaseException, told: str, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = list[tuple[object, ...]]()

    def noting(*given: object) -> bool:
        begun.append(given)
        return True

    monkeypatch.setattr(restore, "start_again", noting)
    server = PrefectServer(password=SecretStr(""), admin_password=SecretStr(""))
    env = Environment(name="lab", rpo_seconds=1, rto_seconds=1, slugs={"prefect_server": "", "services": ""})
    report = Report("Restore Prefect", "lab", "lab")
    with env.with_parts({"prefect_server": server, "services": DockerServices()}).stands_in(), use_report(report):
        stopped = StoppedPrefect(report, Environment.find("lab"), False, ())
        with pytest.raises(type(error)):
            fail_to_swap(stopped, error)
    assert report.state
    assert report.state.value.startswith(told)
    assert bool(begun) is started


def fail_to_swap(stopped: StoppedPrefect, error: BaseException) -> None:
    stop = Change(lambda: None, "stop Prefect", "", reverse=stopped.start_again)
    swap: Change[..., Any] = stopped.guarding(Change(raising(error), "swap", "", begun=SEEN_AT_SWAP))
    with carrying_out(stopped.report, stop, swap, effect=Effect("", "")) as carry:
        carry(stop)
        carry(swap, None, None)
