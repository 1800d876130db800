"""A drill from a TOML file: its fault, its detection, its recovery (docs/declared-drills.md)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blocks.environment import CHECKOUT, Environment
from flows.launch import find_flow
from flows.monitoring.sources import read_application, read_disks
from flows.recovery.drills import detection
from flows.recovery.drills.detection import Sensor, exceeded
from flows.recovery.drills.record import UnfinishedDrill
from flows.recovery.drills.scenario import Drill, Refusal, Scenario, Targets, now
from runbook import metrics
from runbook.change import Change
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import PlannedStep
from runbook.kinds import Bound
from runbook.report import Report
from runbook.wait import until
from tasks.faults.declared import DeclaredFault, heal_declared, read_obstacle, strike_declared, strike_without_effect
from tasks.faults.disposable import Fault
from tasks.host.clocks import read_service_skews
from tasks.logs.reading.access import read_ai_calls

SensorName = Literal["application", "database", "replication", "content", "response", "disk", "providers", "clock"]
PREFIX = "declared:"
WINDOW = timedelta(seconds=15)
SILENT_SECONDS = 4 * WINDOW.total_seconds()
QUIET_SECONDS = 5.0


def response(env: Environment, _: Path) -> str:
    """The 95th percentile of the last seconds against `api.response_seconds`."""
    return exceeded(env, read_application(env, now(), WINDOW), metrics.API_RESPONSE.name)


def disk(env: Environment, _: Path) -> str:
    """The fullest disk of the environment against `host.disk.used_ratio`."""
    return exceeded(env, read_disks(env), metrics.DISK.name)


def providers(env: Environment, _: Path) -> str:
    """AI calls of the last seconds that were not answered by the first provider of the chain, from the log. Users, the
    application's health and its error ratio do not show that."""
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
    """The clocks of the database servers and the application against this host's."""
    over = [one for one in read_service_skews.work(env) if one.is_over]
    return "; ".join(f"the clock of {one.of} is {-(one.ahead_seconds or 0):+.0f} s from this host's" for one in over)


MORE: Mapping[str, Sensor] = {"response": response, "disk": disk, "providers": providers, "clock": clock}


class Recovery(BaseModel):
    """`[recovery]`: the runbook that an on-call engineer launches. Empty: the cause is external, and ends by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runbook: str = ""
    parameters: dict[str, Any] = {}


class Declaration(BaseModel):
    """One file. `lost_writes`: acknowledged writes that may be lost."""

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
        OpsError: no drill has that name, or a key is wrong; the message names the key.
    """
    if not env.drills:
        raise OpsError(f"{env.name} has no directory of declared drills", "set drills at the top of its TOML")
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
        raise OpsError(f"{path.name} is not valid TOML: {error}", "correct that line") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise OpsError(
            f"{path.name}: {key or 'the file'} is wrong: {first['msg']}", "see docs/declared-drills.md"
        ) from None
    if found.recovery.runbook:
        find_flow(found.recovery.runbook)
    return found


def left_behind(left: UnfinishedDrill) -> Declared | None:
    """The scenario of a killed declared drill, as declared at its begin."""
    if not left.scenario.startswith(PREFIX):
        return None
    return Declared(Declaration.model_validate_json(left.notes["declaration"]))


class Declared(Scenario):
    """A declaration as a scenario: the same phases, ledgers and controls."""

    checks = "Detection, lost data, recovery time"
    backups = ()

    def __init__(self, declaration: Declaration) -> None:
        self.declaration, self.declared_fault = declaration, declaration.fault
        self.name = PREFIX + declaration.name  # type: ignore[misc]
        self.title, self.situation, self.goal = declaration.title, declaration.situation, declaration.goal  # type: ignore[misc]
        self.sensors = tuple(declaration.detected_by)  # type: ignore[misc]

    def more_sensors(self) -> Mapping[str, Sensor]:
        """The sensors that only declared drills use."""
        return {name: MORE[name] for name in self.declaration.detected_by if name in MORE}

    def notes(self) -> dict[str, str]:
        """The whole declaration: the file may be changed or deleted."""
        return {"declaration": self.declaration.model_dump_json()}

    def targets(self, env: Environment) -> Targets:
        """As declared."""
        return Targets(self.declaration.rto_seconds, env.rpo_seconds, self.declaration.lost_writes)

    def fault(self, env: Environment) -> Bound[..., Fault]:
        """Return what makes the declared fault."""
        return strike_declared.bind(env, self.declared_fault)

    def judge(self, report: Report, env: Environment) -> None:
        """The fault can be made here, and its sensors report no problem."""
        obstacle = read_obstacle(env, self.declared_fault)
        report.require(
            "the fault can be made here",
            not obstacle,
            "see docs/declared-drills.md",
            value=obstacle or self.declared_fault.text,
        )
        for name, sensor in self.more_sensors().items():
            problem = sensor(env, env.reports_directory)
            report.require(
                f"steady state: {name}",
                not problem,
                "fix this first: a drill starts only in a healthy system",
                value=problem or "within its limit",
            )

    def decide(self, drill: Drill) -> None:
        """The plan of the declared runbook."""
        recovery = self.declaration.recovery
        if recovery.runbook:
            drill.run(find_flow(recovery.runbook), **recovery.parameters)
        drill.done["strategy"] = recovery.runbook or "wait: the cause is external"

    def restore(self, drill: Drill) -> Report:
        """Run the declared runbook, then end the fault."""
        recovery, report = self.declaration.recovery, drill.report
        if recovery.runbook:
            flow = find_flow(recovery.runbook)
            takes = "confirm" in flow.parameters.properties
            report = drill.run(flow, **recovery.parameters, **({"confirm": drill.env.name} if takes else {}))
        heal_declared(drill.env, self.declared_fault)
        return report

    def verify(self, drill: Drill) -> None:
        """The declared sensors report no problem under load. A sensor that reads a log needs some seconds without
        errors. `steady.wait_settled` waits for the others.

        Raises:
            OpsError: one still raises an alarm.
        """
        problems = dict[str, str]()

        def silent() -> bool:
            problems.update(
                (name, sensor(drill.env, drill.directory / "evidence"))
                for name, sensor in self._declared_sensors().items()
            )
            return not any(problems.values())

        try:
            until(silent, what="the end of the alarm", seconds=SILENT_SECONDS, every_seconds=0.5)
        except Unreachable:
            what = "; ".join(filter(None, problems.values()))
            raise OpsError(
                f"the alarm continues {SILENT_SECONDS:g} s after the end of the fault: {what}",
                "check the application: the fault has a lasting effect",
            ) from None

    def control(self, drill: Drill) -> list[Refusal]:
        """The sensors must notice the effect, not the fault: neither the ended fault nor a fault without an effect may
        raise an alarm."""
        env, found = drill.env, list[Refusal]()
        found.append(Refusal("the fault has ended", "the monitoring", self._silence(drill)))
        try:
            if self._striking_without_effect(env)():
                found.append(Refusal("a fault without an effect", "the monitoring", self._silence(drill)))
        finally:
            heal_declared(env, self.declared_fault)
        return found

    def heal(self, drill: Drill) -> None:
        """End the fault."""
        heal_declared(drill.env, self.declared_fault)

    def recovering(self, drill: Drill) -> Change[[], None]:
        """Plan the declared runbook, and the end of the fault."""
        end = PlannedStep("end the fault", self.declared_fault.text)
        return replace(super().recovering(drill), more=[end])

    def controlling(self, drill: Drill) -> Change[[], list[Refusal]]:
        """Plan to check for false alarms: no runbook reads a copy here."""
        return replace(
            super().controlling(drill),
            step="check for false alarms",
            detail="neither the ended fault nor one without an effect may raise an alarm",
            by=[self._striking_without_effect(drill.env)],
        )

    def _striking_without_effect(self, env: Environment) -> Bound[[], bool]:
        return strike_without_effect.bind(env, self.declared_fault)

    def _declared_sensors(self) -> dict[str, Sensor]:
        own = {**detection.SENSORS, **MORE}
        return {name: own[name] for name in self.declaration.detected_by}

    def _silence(self, drill: Drill) -> str:
        """`no alarm of …` if no declared sensor raises an alarm for some seconds, else "". Every sensor is queried as
        often as an alarm needs."""
        sensors = self._declared_sensors()

        def alarmed() -> bool:
            return any(detection.ask_all.work(drill.env, drill.directory / "evidence", sensors).values())

        try:
            until(alarmed, what="an alarm", seconds=QUIET_SECONDS, every_seconds=detection.EVERY_SECONDS)
        except Unreachable:
            return f"no alarm of {', '.join(sensors)} within {QUIET_SECONDS:g} s"
        return ""
