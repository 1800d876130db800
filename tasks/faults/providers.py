"""Failing AI providers of a disposable environment, by the proxy in front of them (`tasks.ai.proxy`) or, in the lab, by
their own control address.

Both accept `POST {control}/control/{provider} {"failing": true}` and return the providers' states at
`GET {control}/health`. Only the proxy accepts a kind of `fault`, and counts requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from blocks.ai_providers import ProviderFault
from blocks.environment import Environment
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.ai.answer import Failed
from tasks.ai.http import call
from tasks.faults.disposable import BREAK, Fault, require_disposable

SECONDS = 10.0
FAILING = "failing"
MEANING: dict[ProviderFault, str] = {
    "500": "every request is refused with a server error",
    "429": "every request is refused with 429 Too Many Requests",
    "timeout": "no request is answered",
    "refused": "connections are refused",
    "slow": "every answer is delayed",
}
PROXY_HINT = (
    "set [ai_providers] proxy and control, run python -m tasks.ai.proxy, and use its addresses as the base URLs of the"
    " application: real providers cannot be made to fail (docs/ai-fallback.md)"
)


def provider(env: Environment, name: str) -> str:
    """Return the target of the act."""
    return f"AI provider {name} of {env.name}"


@probe
def read_provider_states(env: Environment) -> dict[str, str]:
    """Provider → "ok" or "failing".

    Raises:
        Unreachable: they do not answer.
        OpsError: the environment is not disposable, or [ai_providers] control is not set.
    """
    require_disposable(env)
    found = _request(env, "GET", "/health").get("providers")
    if not isinstance(found, dict):
        raise OpsError(f"{env.ai_providers.control}/health returns no providers", "correct [ai_providers] control")
    return {str(name): str(state) for name, state in found.items()}


@probe
def read_received(env: Environment) -> dict[str, int]:
    """Provider → the number of requests that the proxy has received since its start; empty without a proxy.

    Raises:
        Unreachable: the proxy does not answer.
        OpsError: something else answers at its address.
    """
    if not env.ai_providers.proxy:
        return {}
    found = _request(env, "GET", "/health").get("received")
    if not isinstance(found, dict):
        raise OpsError(
            f"{env.ai_providers.control} is not the proxy",
            "run python -m tasks.ai.proxy there, or correct [ai_providers] control",
        )
    return {str(name): int(count) for name, count in found.items()}


@action(of=lambda env, name: Act(BREAK, provider(env, name)), idempotent=True)
def fail_provider(env: Environment, name: str, fault: ProviderFault = "500", delay_seconds: float = 0.0) -> Fault:
    """Make every request to a provider fail in this way, from now on; `slow`: every answer is delayed.

    Raises:
        OpsError: the environment is not disposable, or the provider cannot fail in this way.
    """
    require_disposable(env)
    began = datetime.now(UTC)
    _set(env, name, failing=True, fault=fault, delay_seconds=delay_seconds)
    return Fault(f"{name}: {MEANING[fault]}", began, datetime.now(UTC))


@action(idempotent=True)
def heal_providers(env: Environment, names: Sequence[str]) -> None:
    """End the faults of all of them, also if one cannot be healed. Without a permit: a lost lock or a containment must
    not keep a fault active.

    Raises:
        Unreachable, OpsError: one of them could not be healed.
    """
    problems = list[OpsError]()
    require_disposable(env)
    for name in names:
        try:
            _set(env, name, failing=False)
        except OpsError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def _set(
    env: Environment, name: str, *, failing: bool, fault: ProviderFault = "500", delay_seconds: float = 0.0
) -> None:
    kind: dict[str, str | float] = {"fault": fault, "delay_seconds": delay_seconds} if env.ai_providers.proxy else {}
    if fault != "500" and not kind:
        raise OpsError(
            f"{fault} needs the proxy: the providers' own control only supports 500",
            "set [ai_providers] proxy and run python -m tasks.ai.proxy",
        )
    _request(env, "POST", f"/control/{name}", {"failing": failing, **kind})
    state = read_provider_states.work(env).get(name)
    if (state == FAILING) is not failing:
        raise OpsError(
            f"{name} should {'fail' if failing else 'answer'}, but is {state}",
            "restart the providers: that ends every fault",
        )


def _request(
    env: Environment, method: str, path: str, body: Mapping[str, bool | str | float] | None = None
) -> dict[str, object]:
    control = env.ai_providers.control.rstrip("/")
    if not control:
        raise OpsError(f"[ai_providers] control of {env.name} is not set", PROXY_HINT)
    try:
        return call(method, control + path, {}, SECONDS, body, proxied=False)
    except Failed as error:
        kind = Unreachable if error.kind in ("unreachable", "hangs") else OpsError
        raise kind(
            f"the AI providers at {control}: {error.said}",
            "start them (the proxy: python -m tasks.ai.proxy), or correct [ai_providers] control",
        ) from None
