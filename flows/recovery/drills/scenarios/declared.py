"""A drill that a TOML file declares: its fault, its detection, its recovery (docs/declared-drills.md)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blocks.environment import CHECKOUT, Environment
from flows.launch import find_flow
from flows.monitoring.sources import read_application, read_disks
from flows.recovery.drills import detection
from flows.recovery.drills.detection import Sensor, exceeded
from flows.recovery.drills.record import HalfDone
from flows.recovery.drills.scenario import Drill, Refusal, Scenario, Targets, now
from runbook import metrics
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.wait import until
from tasks.faults.declared import DeclaredFault, heal_declared, read_obstacle, strike_declared, strike_without_effect
from tasks.faults.disposable import BREAK, Fault
from tasks.host.clocks import read_service_skews
from tasks.logs.reading.access import read_ai_calls

SensorName = Literal["application", "database", "replication", "content", "response", "disk", "providers", "clock"]
PREFIX = "declared:"
WINDOW = timedelta(seconds=15)
SILENT_SECONDS = 4 * WINDOW.total_seconds()
QUIET_SECONDS = 5.0


def response(env: Environment, _: Path) -> str:
    """95 of 100 requests of the last seconds, against `api.response_seconds`."""
    return exceeded(env, read_application(env, now(), WINDOW), metrics.API_RESPONSE.name)


def disk(env: Environment, _: Path) -> str:
    """The fullest of the environment's disks, against `host.disk.used_ratio`."""
    return exceeded(env, read_disks(env), metrics.DISK.name)


def providers(env: Environment, _: Path) -> str:
    """AI calls of the last seconds that another provider than the first of the chain answered, by the log. Users notice
    nothing of it, nor do the application's health and error ratio."""
    if not env.has("ai_providers") or not env.has("logs"):
        return "[ai_providers] and [logs] do not describe AI calls"
    try:
        calls = read_ai_calls.work(env.logs, now() - WINDOW)
    except OpsError as error:
        return error.message
    first = env.ai_providers.chain[0]
    others = [f"{name} {count}" for name, count in sorted(calls.items()) if name != first]
    return f"{first} answered {calls.get(first, 0)} AI calls, {', '.join(others)}" if others else ""


def clock(env: Environment, _: Path) -> str:
    """The clocks of the database servers and of the application, against this host's."""
    over = [one for one in read_service_skews.work(env) if one.is_over]
    return "; ".join(f"the clock of {one.of} is {-(one.ahead_seconds or 0):+.0f} s from this host's" for one in over)


MORE: Mapping[str, Sensor] = {"response": response, "disk": disk, "providers": providers, "clock": clock}


class Recovery(BaseModel):
    """`[recovery]`: the runbook that an on-call engineer launches. Empty: the cause is outside, and ends by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runbook: str = ""
    parameters: dict[str, Any] = {}


class Declaration(BaseModel):
    """One file. Times in seconds; `lost_writes`: acknowledged ones that may be lost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    title: str
    situation: str
    goal: str
    detected_by: list[SensorName] = Field(min_length=1)
    rto_seconds: float = Field(gt=0)
    lost_writes: int = Field(default=0, ge=0)
    fault: DeclaredFault
    recovery: Recovery = Recovery()


def read_declaration(env: Environment, name: str) -> Declaration:
    """`NAME.toml` in the directory that `drills` of the environment's TOML names.

    Raises:
        OpsError: there is none of that name, or it is wrong; the message names the key.
    """
    if not env.drills:
        raise OpsError(f"{env.name} names no directory of declared drills", "set drills at the top of its TOML")
    directory = CHECKOUT / env.drills
    names = sorted(path.stem for path in directory.glob("*.toml"))
    if name not in names:
        raise OpsError(
            f"there is no declared drill “{name[:60]}”", f"set declaration to one of {', '.join(names) or 'none'}"
        )
    path = directory / f"{name}.toml"
    try:
        found = Declaration.model_validate({**tomllib.loads(path.read_text(encoding="utf-8")), "name": name})
    except tomllib.TOMLDecodeError as error:
        raise OpsError(f"{path.name} is no TOML: {error}", "correct it") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise OpsError(
            f"{path.name}: {key or 'the file'} is wrong: {first['msg']}", "see docs/declared-drills.md"
        ) from None
    if found.recovery.runbook:
        find_flow(found.recovery.runbook)
    return found


def left_behind(left: HalfDone) -> Declared | None:
    """The scenario of a declared drill that was killed: as it was declared when it began."""
    if not left.scenario.startswith(PREFIX):
        return None
    return Declared(Declaration.model_validate_json(left.notes["declaration"]))


class Declared(Scenario):
    """A declaration as a scenario: the same phases, ledgers and controls."""

    checks = "検知、データ損失、復旧時間"
    backups = ()

    def __init__(self, declaration: Declaration) -> None:
        self.declaration, self.declared_fault = declaration, declaration.fault
        self.name = PREFIX + declaration.name  # type: ignore[misc]
        self.title, self.situation, self.goal = declaration.title, declaration.situation, declaration.goal  # type: ignore[misc]
        self.sensors = tuple(declaration.detected_by)  # type: ignore[misc]

    def more_sensors(self) -> Mapping[str, Sensor]:
        """Those of the declaration that no other drill listens to."""
        return {name: MORE[name] for name in self.declaration.detected_by if name in MORE}

    def notes(self) -> dict[str, str]:
        """The whole declaration: the file may change, or go."""
        return {"declaration": self.declaration.model_dump_json()}

    def targets(self, env: Environment) -> Targets:
        """As declared."""
        return Targets(self.declaration.rto_seconds, env.rpo_seconds, self.declaration.lost_writes)

    def acts(self, env: Environment) -> list[Act]:
        """The fault."""
        return [Act(BREAK, self.declared_fault.target(env))]

    def judge(self, report: Report, env: Environment) -> None:
        """Whether the fault can be made here, and its sensors are silent."""
        obstacle = read_obstacle(env, self.declared_fault)
        report.require(
            "the fault can be made here",
            not obstacle,
            "see docs/declared-drills.md",
            value=obstacle or self.declared_fault.text,
        )
        for name, sensor in self.more_sensors().items():
            told = sensor(env, env.reports_directory)
            report.require(
                f"steady state: {name}",
                not told,
                "fix that first: a drill begins with a healthy system",
                value=told or "within its limit",
            )

    def strike(self, drill: Drill) -> Fault:
        """Made."""
        return strike_declared(drill.permit, drill.env, self.declared_fault)

    def decide(self, drill: Drill) -> None:
        """The runbook's plan, where one is declared."""
        recovery = self.declaration.recovery
        if recovery.runbook:
            drill.run(find_flow(recovery.runbook), **recovery.parameters)
        drill.done["strategy"] = recovery.runbook or "the cause is outside: wait for its end"

    def restore(self, drill: Drill) -> Report:
        """The runbook, confirmed where it takes that; then the cause ends."""
        recovery, report = self.declaration.recovery, drill.report
        if recovery.runbook:
            flow = find_flow(recovery.runbook)
            takes = "confirm" in flow.parameters.properties
            report = drill.run(flow, **recovery.parameters, **({"confirm": drill.env.name} if takes else {}))
        heal_declared(drill.env, self.declared_fault)
        return report

    def verify(self, drill: Drill) -> None:
        """The declared sensors are silent again, under load: those that read a log once its last seconds are good ones.
        `steady.wait_settled` waits for the others.

        Raises:
            OpsError: one still raises an alarm.
        """
        told = dict[str, str]()

        def silent() -> bool:
            told.update(
                (name, sensor(drill.env, drill.directory / "evidence"))
                for name, sensor in self._declared_sensors().items()
            )
            return not any(told.values())

        try:
            until(silent, what="the end of the alarm", seconds=SILENT_SECONDS, every_seconds=0.5)
        except Unreachable:
            what = "; ".join(filter(None, told.values()))
            raise OpsError(
                f"the alarm goes on {SILENT_SECONDS:g} s after the fault: {what}",
                "the fault has another effect that lasts: check the application",
            ) from None

    def settle(self, drill: Drill) -> None:
        """There is nothing to put back."""

    def control(self, drill: Drill) -> list[Refusal]:
        """The sensors must hear the effect, not the fault: the same fault without an effect raises no alarm; and with
        the fault ended, none of them is stuck."""
        env, found = drill.env, list[Refusal]()
        found.append(Refusal("the fault has ended", "the monitoring", self._silence(drill)))
        try:
            if strike_without_effect(drill.permit, env, self.declared_fault):
                found.append(Refusal("a fault without an effect", "the monitoring", self._silence(drill)))
        finally:
            heal_declared(env, self.declared_fault)
        return found

    def heal(self, drill: Drill) -> None:
        """The fault is ended."""
        heal_declared(drill.env, self.declared_fault)

    def _declared_sensors(self) -> dict[str, Sensor]:
        own = {**detection.SENSORS, **MORE}
        return {name: own[name] for name in self.declaration.detected_by}

    def _silence(self, drill: Drill) -> str:
        """That no declared sensor raises an alarm for some seconds; "" where one does. However slow a sensor is, it is
        asked as often as an alarm takes."""
        sensors = self._declared_sensors()

        def heard() -> bool:
            return any(detection.ask_all.work(drill.env, drill.directory / "evidence", sensors).values())

        try:
            until(heard, what="an alarm", seconds=QUIET_SECONDS, every_seconds=detection.EVERY_SECONDS)
        except Unreachable:
            return f"no alarm of {', '.join(sensors)} within {QUIET_SECONDS:g} s"
        return ""
