"""A version of the application brought to its containers, with the way back (§4.1)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.docker import Docker
from blocks.environment import START_ORDER, Environment
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.form import read_forms
from runbook.permit import Permit
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from runbook.wait import until
from tasks.application import wait_healthy
from tasks.docker.building import VERSION, check_version, read_labels
from tasks.docker.deployed import Deployed, RunState, read_deployed, read_log, read_states
from tasks.docker.deploying import (
    Wanted,
    act_of,
    find_images,
    make_containers,
    pull_images,
    remove_aside,
    swap_containers,
    take_back,
)

# Looks in a row, half a second apart, at which nothing had changed: a program that does not find its database takes
# some seconds to say so.
STEADY = 20
# What was well before gets this long at least to be so again.
BACK_SECONDS = 60


@flow(name="deploy-application", flow_run_name="deploy-application {environment} {version}")
def deploy_application(
    environment: str,
    version: str = "",
    roles: tuple[str, ...] = (),
    health_seconds: Annotated[int, Field(ge=1)] = 120,
    recreate: bool = False,
    confirm: str = "",
) -> Report:
    """Dockerイメージ更新: バージョンの配備と切り戻し (§4.1)

    Brings a version to the application's containers: its images are pulled, each container is made anew beside the one
    that runs, as [docker.containers] describes it, and takes its place; the containers and the application's own
    health must be well within `health_seconds`. Where they are not, the containers of before, which were kept, are put
    back and started again, and the run fails with the end of the new ones' logs.

    Run it for a release, or with an older version to go back: an image that is on the engine is enough then, with the
    registry away. While a container is stopped and its successor starts, users wait. A run that was killed is launched
    again: what had been set aside is still the way back. Volumes are kept, files that a container wrote elsewhere are
    not. Evidence: what ran before, the digests, the health.

    Args:
        environment: 対象の環境
        version: 配備するバージョン (イメージのタグ)
        roles: 対象のコンテナ ([docker.containers] の名前)。空ならすべて
        health_seconds: この秒数以内に正常にならなければ元のバージョンに戻す
        recreate: イメージが同じでもコンテナを作り直す (設定を変えたとき)
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Deploy application", env, confirm, changes=True) as report:
        check_version(version)
        block = env.docker
        chosen = _in_order(block, roles)
        now = read_deployed(block, chosen)
        found = find_images(block, chosen, version)
        _tell(report, env, now, found)
        for one in found:
            what = "pull it, make and start it" if one.digest else "it is here: make and start it"
            report.plan("deploy", f"{one.reference} as {one.name}: {what}")
        permit = report.permit(*map(act_of, found))
        pulled = pull_images(permit, block, found)
        _judge_labels(report, block, pulled, version)
        same = {one.role: one.image_id for one in now if one.running}
        new = [one for one in pulled if recreate or same.get(one.role) != one.image_id]
        _accept(report, env, permit, now, pulled, health_seconds)
        made = make_containers(permit, block, new)
        report.state_is("a deployment that was broken off", f"launch deploy-application again, version={version}: "
                        "it goes on, and what ran before is still kept")  # fmt: skip
        try:
            swap_containers(permit, block, new)
            _prove(report, env, [one.role for one in pulled], health_seconds)
        except OpsError as error:
            set_aside = {one.role for one in now if one.before}
            touched = [one for one in pulled if one in new or one.role in set_aside]
            _go_back(report, env, permit, touched, made, error, health_seconds)
        remove_aside(permit, block, pulled)
        report.state = None
        report.outcome = f"{version} runs: {', '.join(one.name for one in pulled)}" + ("" if new else ", as before")
    return report


def _in_order(block: Docker, roles: Sequence[str]) -> list[str]:
    """What others depend on first.

    Raises:
        OpsError: there is no such container, or none at all.
    """
    chosen = list(dict.fromkeys(roles)) or list(block.containers)
    if not chosen:
        raise OpsError("the environment describes no container", "add [docker.containers.backend] to its TOML")
    for role in chosen:
        block.container(role)
    order = {role: number for number, role in enumerate(START_ORDER)}
    return sorted(chosen, key=lambda role: order.get(role, len(order)))


def _tell(report: Report, env: Environment, now: Sequence[Deployed], found: Sequence[Wanted]) -> None:
    rows = [(one.name, one.reference or "none", "runs" if one.running else "does not run", want.reference,
             want.digest or want.image_id) for one, want in zip(now, found, strict=True)]  # fmt: skip
    report.table("Containers", ("container", "now", "state", "then", "digest"), rows)
    for one in now:
        if one.before:
            report.warn(f"{one.name} of before", "this run goes back to that one where it must",
                        value=f"a deployment was broken off: {one.before} was set aside")  # fmt: skip
    versions = {one.version for one in now if one.version}
    if len(versions) == 1:
        back = {"environment": env.name, "version": versions.pop()}
        report.fact("the way back", read_forms([env.name]).link("deploy-application", env.name, back))


def _accept(
    report: Report, env: Environment, permit: Permit, now: Sequence[Deployed], found: Sequence[Wanted], seconds: int
) -> None:
    """A run that was killed set something aside, and its successor may have proven itself since: then that one is what
    runs before this deployment, and not removed for one that nobody has seen."""
    left = [want for one, want in zip(now, found, strict=True) if one.before and one.running]
    if not left:
        return
    try:
        _prove(report, env, [one.role for one in left], max(seconds, BACK_SECONDS))
    except OpsError:
        return
    remove_aside(permit, env.docker, left)


def _judge_labels(report: Report, block: Docker, pulled: Sequence[Wanted], version: str) -> None:
    """What the image says of itself."""
    for one in pulled:
        told = (read_labels(block.host, one.reference) or {}).get(VERSION, "")
        report.expect(f"label of {one.reference}", told == version, "build it with build-images: it is labelled then",
                      value=told or "none", expected=version, otherwise=Status.WARN)  # fmt: skip


def _prove(report: Report, env: Environment, roles: Sequence[str], seconds: int) -> None:
    """The containers are well by the engine's word, then the application by its own.

    Raises:
        OpsError: not within the deadline.
    """
    last, steady, started = dict[str, RunState](), 0, time.monotonic()

    def well() -> bool:
        nonlocal last, steady
        before, last = last, dict(read_states.work(env.docker, roles))
        steady = steady + 1 if last == before and all(state.well for state in last.values()) else 0
        return steady >= STEADY

    try:
        until(well, what="well", seconds=seconds, every_seconds=0.5)
    except Unreachable as error:
        told = ", ".join(f"{role} is {state}" for role, state in last.items()) or error.message
        raise OpsError(f"after {seconds} s {told}") from None
    left = seconds - (time.monotonic() - started)
    if env.has("application"):
        report.fact("health", wait_healthy(env.application, seconds=max(left, 1)).answer)
    else:
        report.warn("the application's health", "add [application] url: nobody asked it", value="not known")
    if (now := dict(read_states(env.docker, roles))) != last:
        raise OpsError(f"meanwhile {', '.join(f'{role} is {state}' for role, state in now.items())}")


def _go_back(
    report: Report, env: Environment, permit: Permit, touched: Sequence[Wanted], made: Mapping[str, str],
    error: OpsError, seconds: int,
) -> None:  # fmt: skip
    """The containers of before again.

    Raises:
        RunbookFailed: always: the version is not there.
    """
    for one in touched:
        try:
            log = read_log(env.docker, one.role)
        except OpsError as unread:  # a logging driver that cannot be read, say: what matters is the way back
            log = f"not known: {unread.message}"
        report.attach(Evidence(f"End of the log of {one.name}", text=f"```\n{log[-3000:]}\n```"))
    report.expect("the new version is healthy", False, "look at its logs below; what was before runs again",
                  value=error.message)  # fmt: skip
    without = take_back(permit, env.docker, touched, made)
    report.state = None
    hint = "launch deploy-application with a version that is known to be well"
    try:
        if without or not touched:
            raise OpsError(f"there was nothing to go back to{': ' if without else ''}{', '.join(without)}")
        _prove(report, env, [one.role for one in touched], max(seconds, BACK_SECONDS))
        report.expect("what was before runs again", True, hint, value="and is healthy")
    except OpsError as second:
        report.expect("what was before runs again", False, hint, value=second.message)
    raise RunbookFailed(report)
