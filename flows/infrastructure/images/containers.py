"""A version brought to the application's containers, with the way back, called with the open report (§4.1)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocks.docker import Docker
from blocks.environment import START_ORDER, Environment
from runbook.errors import Locked, LockLost, OpsError, RunbookFailed, Unreachable
from runbook.guard.permit import Act, Permit
from runbook.page.form import read_forms
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.wait import until
from tasks.application.health import wait_healthy
from tasks.docker.building import VERSION, check_version, read_labels
from tasks.docker.deployed import Deployed, RunState, read_deployed, read_log, read_states
from tasks.docker.deploying import (
    Wanted,
    act_of,
    find_images,
    make_containers,
    pull_images,
    remove_aside,
    remove_failed,
    swap_containers,
    take_back,
)

# Looks in a row, half a second apart, at which nothing had changed: a program that does not find its database takes
# some seconds to say so.
STEADY = 20
# What was well before gets this long at least to be so again.
BACK_SECONDS = 60


@dataclass(frozen=True)
class Containers:
    """Images pulled, containers made anew beside those that run. `again`: also where the image is the same."""

    env: Environment
    version: str
    seconds: int
    again: bool
    now: Sequence[Deployed]
    wanted: Sequence[Wanted]

    @classmethod
    def found(cls, env: Environment, version: str, seconds: int, again: bool, roles: Sequence[str]) -> Containers:
        """What is there, and the images of that version.

        Raises:
            OpsError: there is no such version, or no such container.
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
        """What is there, what would be done; returns what has to be permitted."""
        _report_results(report, self.env, self.now, self.wanted)
        for one in self.wanted:
            what = "it is here: make and start it" if one.image_id else "pull it, make and start it"
            report.plan("deploy", f"{one.reference} ({one.digest or one.image_id}) as {one.name}: {what}")
        return [act_of(one) for one in self.wanted]

    def carry_out(self, report: Report, permit: Permit) -> str:
        """Deployed, and proven; returns what runs then.

        Raises:
            RunbookFailed: the version is not well; what was before runs again, or the report says that it does not.
        """
        env, block, now = self.env, self.env.docker, self.now
        pulled = pull_images(permit, block, self.wanted)
        _judge_labels(report, block, pulled, self.version)
        same = {one.role: one.image_id for one in now if one.running}
        new = [one for one in pulled if self.again or same.get(one.role) != one.image_id]
        _accept(report, env, permit, now, pulled, self.seconds)
        made = make_containers(permit, block, new)
        report.state_is(
            "a deployment that was broken off",
            f"launch deploy-application again, version={self.version}: it goes on, and what ran before is still kept",
        )
        try:
            swap_containers(permit, block, new)
            _prove(report, env, [one.role for one in pulled], self.seconds)
        except (Locked, LockLost):  # what is there is another run's now
            raise
        except OpsError as error:
            set_aside = {one.role for one in now if one.before}
            touched = [one for one in pulled if one in new or one.role in set_aside]
            _go_back(report, env, permit, touched, made, error, self.seconds)
        remove_aside(permit, block, pulled)
        report.state = None
        return f"{self.version} runs: {', '.join(one.name for one in pulled)}" + ("" if new else ", as before")


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


def _report_results(report: Report, env: Environment, now: Sequence[Deployed], found: Sequence[Wanted]) -> None:
    rows = [
        (one.name, one.reference or "none", "runs" if one.running else "does not run", want.reference, want.image)
        for one, want in zip(now, found, strict=True)
    ]
    report.table("Containers", ("container", "now", "state", "then", "image by digest"), rows)
    for want in found:
        if not want.digest:
            report.fact(
                f"{want.reference} is not pinned",
                "no registry gave it a digest: this engine's image "
                f"{want.image_id} is deployed; another host may have another one by that tag",
            )
    for one in now:
        if one.before:
            report.warn(
                f"{one.name} of before",
                "this run goes back to that one where it must",
                value=f"a deployment was broken off: {one.before} was set aside",
            )
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
        told = (read_labels(block.host, one.image) or {}).get(VERSION, "")
        report.prefer(
            f"label of {one.reference}",
            told == version,
            "build it with build-images: it is labelled then",
            value=told or "none",
            expected=version,
        )


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
    health = wait_healthy(env.application, seconds=max(left, 1))
    report.fact("health", health.answer)
    if not health.configured:
        report.warn("the application's health", "describe a health check under [application]", value=health.answer)
    if (now := dict(read_states(env.docker, roles))) != last:
        raise OpsError(f"meanwhile {', '.join(f'{role} is {state}' for role, state in now.items())}")


def _go_back(
    report: Report,
    env: Environment,
    permit: Permit,
    touched: Sequence[Wanted],
    made: Mapping[str, str],
    error: OpsError,
    seconds: int,
) -> None:
    """The containers of before again.

    Raises:
        RunbookFailed: always: the version is not there.
    """
    report.fail("the new version is healthy", "look at its logs below; what was before runs again", value=error.message)
    without = take_back(permit, env.docker, touched, made)
    report.state = None
    hint = "launch deploy-application with a version that is known to be well"
    try:
        if without or not touched:
            raise OpsError(f"there was nothing to go back to{': ' if without else ''}{', '.join(without)}")
        _prove(report, env, [one.role for one in touched], max(seconds, BACK_SECONDS))
        report.passed("what was before runs again", value="and is healthy")
    except OpsError as second:
        report.fail("what was before runs again", hint, value=second.message)
    _attach_logs(report, env, permit, touched)
    raise RunbookFailed(report)


def _attach_logs(report: Report, env: Environment, permit: Permit, failed: Sequence[Wanted]) -> None:
    """The ends of the failed containers' logs. One that cannot be read, by its logging driver or the engine, changes
    nothing: its container is kept for a person, until the next deployment."""
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
        report.warn("failed containers", "the next deployment removes them", value=f"not removed: {error.message}")
