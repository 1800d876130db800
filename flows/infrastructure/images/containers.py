"""Deploy a version as containers, with a rollback (§4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from blocks.docker import Docker
from blocks.environment import START_ORDER, Environment
from runbook.change import Carrier, Change, Line, State
from runbook.errors import Locked, LockLost, OpsError, RunbookFailed, Unreachable
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.page.form import read_forms
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.wait import until
from tasks.application.health import wait_healthy
from tasks.docker.building import VERSION, check_version, read_labels
from tasks.docker.deployed import Deployed, RunState, previous_name, read_deployed, read_log, read_states
from tasks.docker.deploying import (
    WantedContainer,
    create_containers,
    find_images,
    next_name,
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

    report: Report
    env: Environment
    version: str
    seconds: int
    again: bool
    now: Sequence[Deployed]
    wanted: Sequence[WantedContainer]

    @classmethod
    def find(
        cls, report: Report, env: Environment, version: str, seconds: int, again: bool, roles: Sequence[str]
    ) -> ContainerDeployment:
        """Read the running containers and the images of the version.

        Raises:
            OpsError: the version or a container does not exist.
        """
        check_version(version)
        chosen = _in_order(env.docker, roles)
        now = read_deployed(env.docker, chosen)
        return cls(report, env, version, seconds, again, now, find_images(env.docker, chosen, version))

    @property
    def identity(self) -> str:
        """The digest (or id) of each image."""
        return ", ".join(f"{one.role} {one.digest or one.image_id}" for one in self.wanted)

    def judge(self) -> None:
        """Report the running containers."""
        _report_versions(self.report, self.env, self.now, self.wanted)

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """The planned changes."""
        return [*self._accepting, self._creating, self._replacing]

    def carry_out(self, carry: Carrier) -> str:
        """Deploy and prove it; returns what runs then.

        Raises:
            RunbookFailed: the version is unhealthy. The report states whether the previous version runs again.
        """
        for accepting in self._accepting:
            carry(accepting)
        created = carry(self._creating)
        carry(self._replacing, created)
        return f"{self.version} runs: {', '.join(one.name for one in self.wanted)}" + ("" if created else ", as before")

    @cached_property
    def _accepting(self) -> list[Change[[], None]]:
        """After an interrupted deployment the new container can be healthy by now. Then it is the version to roll back
        to, and the kept one is removed."""
        left = [want for one, want in zip(self.now, self.wanted, strict=True) if one.previous and one.running]
        if not left:
            return []
        remove = remove_previous.bind(self.env.docker, left)

        def accept() -> None:
            try:
                _prove(self.report, self.env, [one.role for one in left], max(self.seconds, BACK_SECONDS))
            except OpsError:
                return
            remove()

        first, *others = (
            PlannedStep("remove", f"{previous_name(one.name)}, if {one.name} is healthy now") for one in left
        )
        return [Change(accept, "remove", first.detail, more=others, by=[remove])]

    @cached_property
    def _creating(self) -> Change[[], dict[str, str]]:
        """Pull the images; create the containers whose image is another one than before."""
        block = self.env.docker
        pull, create = pull_images.bind(block, self.wanted), create_containers.bind(block, self.wanted)

        def stage() -> dict[str, str]:
            pulled = pull()
            _judge_labels(self.report, block, self.wanted, self.version)
            same = {one.role: one.image_id for one in self.now if one.running}
            return create([role for role, image in pulled.items() if self.again or same.get(role) != image])

        first, *others = (
            PlannedStep(
                "create",
                f"{next_name(one.name)} from {one.reference} ({one.digest or one.image_id}): "
                + ("the image is local" if one.image_id else "pull the image"),
            )
            for one in self.wanted
        )
        return Change(stage, "create", first.detail, more=others, by=[pull, create])

    @cached_property
    def _replacing(self) -> Change[[Mapping[str, str]], None]:
        """Swap the containers and prove them, or roll back."""
        block, wanted = self.env.docker, self.wanted
        swap, remove = swap_containers.bind(block, wanted), remove_previous.bind(block, wanted)
        roll_back, clear = roll_back_containers.bind(block, wanted), remove_failed.bind(block, wanted)

        def replace(created: Mapping[str, str]) -> None:
            try:
                swap(created)
                _prove(self.report, self.env, [one.role for one in wanted], self.seconds)
            except (Locked, LockLost):  # another run can own the containers now
                raise
            except OpsError as error:
                self.report.fail("the new version is healthy", "read the end of its logs below", value=error.message)
                touched = [one.role for one in self.now if one.role in created or one.previous]
                without = roll_back(touched, created)
                self.report.state = None
                self._judge_previous(touched, without)
                self._attach_logs(touched, clear)
                raise RunbookFailed(self.report) from error
            remove()
            self.report.state = None

        first, *others = (
            PlannedStep("deploy", f"{one.reference} as {one.name}, then healthy within {self.seconds} s, or roll back")
            for one in wanted
        )
        return Change(
            replace,
            "deploy",
            first.detail,
            more=others,
            by=[swap, roll_back, clear, remove],
            begun=State(
                "an interrupted deployment",
                f"run deploy-application again, version={self.version}: it continues; the previous version is still "
                "kept",
            ),
        )

    def _judge_previous(self, touched: Sequence[str], without: Sequence[str]) -> None:
        """Whether the previous containers of these roles run again. `without`: the roles that had none."""
        try:
            if without or not touched:
                raise OpsError(f"no previous container exists{': ' if without else ''}{', '.join(without)}")
            _prove(self.report, self.env, touched, max(self.seconds, BACK_SECONDS))
            self.report.passed("the previous version runs again", value="it is healthy")
        except OpsError as error:
            self.report.fail("the previous version runs again", LAST_RESORT, value=error.message)

    def _attach_logs(self, failed: Sequence[str], clear: Callable[[Sequence[str]], None]) -> None:
        """The ends of the failed containers' logs. A container whose log cannot be read is kept until the next
        deployment."""
        read = []
        for role in failed:
            try:
                log = read_log(self.env.docker, role)
                read.append(role)
            except OpsError as unread:
                log = f"not known: {unread.message}"
            name = self.env.docker.name_of(role)
            self.report.attach(Evidence(f"End of the log of {name}", text=fenced(log[-3000:])))
        try:
            clear(read)
        except OpsError as error:
            self.report.warn(
                "failed containers",
                "nothing to do: the next deployment removes them",
                value=f"not removed: {error.message}",
            )


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


def _judge_labels(report: Report, block: Docker, wanted: Sequence[WantedContainer], version: str) -> None:
    """Whether the image's label states the deployed version."""
    for one in wanted:
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
