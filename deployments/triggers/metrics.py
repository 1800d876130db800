"""What Prefect does about a metric that is exceeded (appendix B): what the table says, once an hour each. People are
called within minutes.

Two of one kind never run at once: what changes something holds the environment's lock, and who comes second is refused.
What deletes (clear-cache, clean-logs, clean-docker) does so only where the environment's `unattended` names it; else it
ends with its plan, whose form is filled in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from blocks.environment import Environment
from deployments.runbooks import flows_for
from deployments.triggers.launch import launch
from flows.monitoring.sources import other_hosts
from flows.monitoring.table import ALARMS
from flows.monitoring.wording import watch_stopped
from tasks.monitoring.events import PREFIX

WITHIN = timedelta(hours=1)
SILENCE = timedelta(minutes=15)
TOLD = {name: f"{{{{ event.payload.{name} }}}}" for name in ("what", "owner", "key")}


@dataclass(frozen=True)
class Deed:
    """One automation: of a metric (`*`: of any) that was measured, or could not be; or that is exceeded `again`;
    `elsewhere`: of a host that another watcher measures."""

    name: str
    metric: str
    flow: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    measured: bool = True
    again: bool = False
    elsewhere: bool = False

    @property
    def description(self) -> str:
        """For the UI."""
        if self.again:
            return f"{self.flow} when a metric is still exceeded after ten minutes, and every hour"
        what = f"{self.metric} is exceeded" if self.measured else f"{self.metric} could not be measured"
        action = ALARMS[self.metric].action if self.measured and self.metric in ALARMS else "find the cause"
        return f"{action} (appendix B): {self.flow} when {what}, once an hour at most"


def deeds(env: Environment) -> Iterator[Deed]:
    """The table's actions, for what the environment has; and whom people are called for."""
    acts = list(_acts(env))
    if env.has("alerts"):
        yield from escalations(env, {deed.metric for deed in acts if deed.flow in env.unattended})
    yield from acts


def _acts(env: Environment) -> Iterator[Deed]:
    if env.has("postgres"):
        yield Deed("investigate-replication", "postgres.replication.lag_seconds", "diagnose-database")
        yield Deed("investigate-database", "postgres.connections.used_ratio", "diagnose-database", measured=False)
        yield Deed("scale-connections", "postgres.connections.used_ratio", "advise-scaling", {"part": "connections"})
    yield Deed("scale-cpu", "host.cpu.used_ratio", "advise-scaling", {"part": "cpu"})
    if env.has("redis") and env.redis.drop_prefixes:
        given = {"prefixes": list(env.redis.drop_prefixes)}
        yield Deed("clear-cache", "redis.memory.used_ratio", "clear-cache", given)
    if env.has("logs"):
        yield Deed("clean-logs", "host.disk.used_ratio", "clean-logs")
        yield Deed("report-tokens", "ai.tokens.budget_ratio", "report-token-usage")
    if env.has("docker"):
        yield Deed("clean-docker", "host.disk.used_ratio", "clean-docker")


def escalations(env: Environment, acted_on: Collection[str]) -> Iterator[Deed]:
    """People are called at once, except for a metric on which a pre-authorised runbook acts: it has ten minutes to
    help. A runbook that only advises or plans helps nobody."""
    for metric in ALARMS.values():
        if metric.name not in acted_on:
            yield Deed(f"escalate-{metric.name}", metric.name, "escalate", {"severity": metric.severity, **TOLD})
    if other_hosts(env):
        severity = {"severity": "{{ event.payload.severity }}", **TOLD}
        yield Deed("escalate-hosts", "host.*", "escalate", severity, elsewhere=True)
    yield Deed("escalate-not-measured", "*", "escalate", {"severity": "{{ event.payload.severity }}", **TOLD}, False)
    yield Deed("escalate-persisting", "*", "escalate", {"severity": "{{ event.payload.severity }}", **TOLD}, again=True)


def automations(client: SyncPrefectClient, environment: str) -> list[AutomationCore]:
    """One for each deed whose flow is deployed for the environment."""
    env = Environment.find(environment)
    there = flows_for(env)
    acts = [_automation(client, environment, deed) for deed in deeds(env) if deed.flow in there]
    return [*acts, *([silent(client, environment)] if env.has("alerts") else [])]


def silent(client: SyncPrefectClient, environment: str, silence: timedelta = SILENCE) -> AutomationCore:
    """A watcher that died, hangs or cannot write says nothing, as if all were well: it is escalated."""
    given = {
        "severity": "severe",
        "what": watch_stopped(environment),
        "owner": "SRE",
        "key": f"watching {environment}",
    }
    return AutomationCore(
        name=f"watching-silent-{environment}",
        description="a watcher that was silent for a quarter of an hour is escalated",
        trigger=EventTrigger(
            after={f"{PREFIX}.watching"},
            expect={f"{PREFIX}.watching"},
            match=ResourceSpecification({"prefect.resource.id": f"{PREFIX}.{environment}.watching"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=silence,
        ),
        actions=[launch(client, environment, "escalate", given)],
    )


def _automation(client: SyncPrefectClient, environment: str, deed: Deed) -> AutomationCore:
    labels: dict[str, str | list[str]] = {
        "prefect.resource.id": f"{PREFIX}.{environment}.{deed.metric}",
        **({f"{PREFIX}.again": "yes"} if deed.again else {f"{PREFIX}.measured": "yes" if deed.measured else "no"}),
        **({f"{PREFIX}.elsewhere": "yes"} if deed.elsewhere else {}),
    }
    return AutomationCore(
        name=f"{deed.name}-{environment}",
        description=deed.description,
        trigger=EventTrigger(
            expect={f"{PREFIX}.exceeded"},
            match=ResourceSpecification(labels),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=WITHIN,
        ),
        actions=[launch(client, environment, deed.flow, deed.parameters)],
    )
