"""Deploy a version as containers, with a rollback (§4.1)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocks.docker import Docker
from blocks.environment import START_ORDER, Environment
from runbook.errors import Locked, LockLost, OpsError, RunbookFailed, Unreachable
from runbook.guard.permit import Act, Permit
from runbook.next import Next
from runbook.page.form import read_forms
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.wait import until
from tasks.application.health import wait_healthy
from tasks.docker.building import VERSION, check_version, read_labels
from tasks.docker.deployed import Deployed, RunState, read_deployed, read_log, read_states
from tasks.docker.deploying import (
    WantedContainer,
    act_of,
    create_containers,
    find_images,
    pull_images,
    remove_failed,
    remove_previous,
    roll_back_containers,
    swap_containers,
)

# Equal states in a row, 0.5 s apart: a program that cannot reach its database takes some seconds to report it.
STEADY = 20
# The previous version gets at least this long to become healthy.
BACK_SECONDS = 60
LAST_RESORT = "run deploy-application with a version that is known to work"


@dataclass(frozen=True)
class ContainerDeployment:
    """Images pulled, containers created alongside the running ones. `again`: also if the image is the same."""

    env: Environment
    version: str
    seconds: int
    again: bool
    now: Sequence[Deployed]
    wanted: Sequence[WantedContainer]

    @classmethod
    def find(
        cls, env: Environment, version: str, seconds: int, again: bool, roles: Sequence[str]
    ) -> ContainerDeployment:
        """Read the running containers and the images of the version.

        Raises:
            OpsError: the version or a container does not exist.
        """
        check_version(version)
        chosen = _in_order(env.docker, roles)
        now = read_deployed(env.docker, chosen)
        return cls(env, version, seconds, again, now, find_images(env.docker, chosen, version))

    @property
    def identity(self) -> str:
        """The digest (or id) of each image."""
        return ", ".join(f"{one.role} {one.digest or one.image_id}" for one in self.wanted)

    def plan(self, report: Report) -> list[Act]:
        """Report the running containers and the planned steps; returns the acts that need a permit."""
        _report_versions(report, self.env, self.now, self.wanted)
        for one in self.wanted:
            what = "the image is local: create and start it" if one.image_id else "pull the image, create and start it"
            report.plan("deploy", f"{one.reference} ({one.digest or one.image_id}) as {one.name}: {what}")
        return [act_of(one) for one in self.wanted]

    def carry_out(self, report: Report, permit: Permit) -> str:
        """Deploy and prove it; returns what runs then.

        Raises:
            RunbookFailed: the version is unhealthy. The report states whether the previous version runs again.
        """
        env, block, now = self.env, self.env.docker, self.now
        pulled = pull_images(permit, block, self.wanted)
        _judge_labels(report, block, pulled, self.version)
        same = {one.role: one.image_id for one in now if one.running}
        new = [one for one in pulled if self.again or same.get(one.role) != one.image_id]
        _accept_interrupted(report, env, permit, now, pulled, self.seconds)
        created = create_containers(permit, block, new)
        report.state_is(
            "an interrupted deployment",
            f"run deploy-application again, version={self.version}: it continues; the previous version is still kept",
        )
        try:
            swap_containers(permit, block, new)
            _prove(report, env, [one.role for one in pulled], self.seconds)
        except (Locked, LockLost):  # another run can own the containers now
            raise
        except OpsError as error:
            kept = {one.role for one in now if one.previous}
            touched = [one for one in pulled if one in new or one.role in kept]
            _roll_back(report, env, permit, touched, created, error, self.seconds)
        remove_previous(permit, block, pulled)
        report.state = None
        return f"{self.version} runs: {', '.join(one.name for one in pulled)}" + ("" if new else ", as before")


def _in_order(block: Docker, roles: Sequence[str]) -> list[str]:
    """The chosen roles; a container that others depend on comes first.

    Raises:
        OpsError: a role is not configured, or no container is.
    """
    chosen = list(dict.fromkeys(roles)) or list(block.containers)
    if not chosen:
        raise OpsError("the environment configures no container", "add [docker.containers.backend] to its TOML")
    for role in chosen:
        block.container(role)
    order = {role: number for number, role in enumerate(START_ORDER)}
    return sorted(chosen, key=lambda role: order.get(role, len(order)))


def _report_versions(
    report: Report, env: Environment, now: Sequence[Deployed], found: Sequence[WantedContainer]
) -> None:
    rows = [
        (one.name, one.reference or "none", "runs" if one.running else "stopped", want.reference, want.image)
        for one, want in zip(now, found, strict=True)
    ]
    report.table("Containers", ("container", "now", "state", "then", "image by digest"), rows)
    for want in found:
        if not want.digest:
            report.fact(
                f"{want.reference} is not pinned",
                f"no registry knows its digest: this engine's {want.image_id} is deployed; on another host the tag can "
                "mean another image",
            )
    for one in now:
        if one.previous:
            report.warn(
                f"previous {one.name}",
                "nothing to do: a rollback of this run restores that container",
                value=f"a deployment was interrupted: the container of {one.previous} is kept",
            )
    versions = {one.version for one in now if one.version}
    if len(versions) == 1:
        back = Next("deploy-application", parameters={"version": versions.pop()})
        report.fact("rollback", read_forms([env.name]).next(back, env.name))


def _accept_interrupted(
    report: Report,
    env: Environment,
    permit: Permit,
    now: Sequence[Deployed],
    found: Sequence[WantedContainer],
    seconds: int,
) -> None:
    """After an interrupted deployment the new container can be healthy by now. Then it is the version to roll back to,
    and the kept one is removed."""
    left = [want for one, want in zip(now, found, strict=True) if one.previous and one.running]
    if not left:
        return
    try:
        _prove(report, env, [one.role for one in left], max(seconds, BACK_SECONDS))
    except OpsError:
        return
    remove_previous(permit, env.docker, left)


def _judge_labels(report: Report, block: Docker, pulled: Sequence[WantedContainer], version: str) -> None:
    """Whether the image's label states the deployed version."""
    for one in pulled:
        label = (read_labels(block.host, one.image) or {}).get(VERSION, "")
        report.prefer(
            f"label of {one.reference}",
            label == version,
            "build it with build-images, which labels it",
            value=label or "none",
            expected=version,
        )


def _prove(report: Report, env: Environment, roles: Sequence[str], seconds: int) -> None:
    """Wait until the containers are steadily healthy by the engine, then the application by its health check.

    Raises:
        OpsError: not within `seconds`.
    """
    last, steady, started = dict[str, RunState](), 0, time.monotonic()

    def healthy() -> bool:
        nonlocal last, steady
        before, last = last, dict(read_states.work(env.docker, roles))
        steady = steady + 1 if last == before and all(state.healthy for state in last.values()) else 0
        return steady >= STEADY

    try:
        until(healthy, what="healthy containers", seconds=seconds, every_seconds=0.5)
    except Unreachable as error:
        states = ", ".join(f"{role} is {state}" for role, state in last.items()) or error.message
        raise OpsError(f"after {seconds} s {states}") from None
    left = seconds - (time.monotonic() - started)
    health = wait_healthy(env.application, seconds=max(left, 1))
    report.fact("health", health.answer)
    if not health.configured:
        report.warn("the application's health", "configure a health check under [application]", value=health.answer)
    if (now := dict(read_states(env.docker, roles))) != last:
        raise OpsError(
            f"a container changed meanwhile: {', '.join(f'{role} is {state}' for role, state in now.items())}"
        )


def _roll_back(
    report: Report,
    env: Environment,
    permit: Permit,
    touched: Sequence[WantedContainer],
    created: Mapping[str, str],
    error: OpsError,
    seconds: int,
) -> None:
    """Restore and start the previous containers.

    Raises:
        RunbookFailed: always: the new version is not deployed.
    """
    report.fail("the new version is healthy", "read the end of its logs below", value=error.message)
    without = roll_back_containers(permit, env.docker, touched, created)
    report.state = None
    try:
        if without or not touched:
            raise OpsError(f"no previous container exists{': ' if without else ''}{', '.join(without)}")
        _prove(report, env, [one.role for one in touched], max(seconds, BACK_SECONDS))
        report.passed("the previous version runs again", value="it is healthy")
    except OpsError as second:
        report.fail("the previous version runs again", LAST_RESORT, value=second.message)
    _attach_logs(report, env, permit, touched)
    raise RunbookFailed(report)


def _attach_logs(report: Report, env: Environment, permit: Permit, failed: Sequence[WantedContainer]) -> None:
    """The ends of the failed containers' logs. A container whose log cannot be read is kept until the next
    deployment."""
    read = []
    for one in failed:
        try:
            log = read_log(env.docker, one.role)
            read.append(one)
        except OpsError as unread:
            log = f"not known: {unread.message}"
        report.attach(Evidence(f"End of the log of {one.name}", text=fenced(log[-3000:])))
    try:
        remove_failed(permit, env.docker, read)
    except OpsError as error:
        report.warn(
            "failed containers",
            "nothing to do: the next deployment removes them",
            value=f"not removed: {error.message}",
        )
