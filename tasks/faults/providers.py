"""AI providers of a disposable environment made to fail, one by one, and healed: by the proxy in front of them
(`tasks.ai.proxy`), or by their own control, as the lab's have it.

Both take `POST {control}/control/{provider} {"failing": true}` and return the providers' states by
`GET {control}/health`. Only the proxy takes a kind of `fault`, and counts requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from blocks.ai_providers import ProviderFault
from blocks.environment import Environment
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from tasks.ai.answer import Failed
from tasks.ai.http import call
from tasks.faults.disposable import Fault, require_allowed, require_disposable

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
    "real providers cannot be made to fail: set [ai_providers] proxy and control, run python -m tasks.ai.proxy, and use"
    " its addresses as the base URLs of the application (docs/ai-fallback.md)"
)


def provider(env: Environment, name: str) -> str:
    """What a permit for it names."""
    return f"AI provider {name} of {env.name}"


@probe
def read_provider_states(env: Environment) -> dict[str, str]:
    """Provider → "ok" or "failing".

    Raises:
        Unreachable: they do not answer.
        OpsError: the environment is not disposable, or says not where its providers are told to fail.
    """
    require_disposable(env)
    found = _asked(env, "GET", "/health").get("providers")
    if not isinstance(found, dict):
        raise OpsError(f"{env.ai_providers.control}/health tells no providers", "correct [ai_providers] control")
    return {str(name): str(state) for name, state in found.items()}


@probe
def read_received(env: Environment) -> dict[str, int]:
    """Provider → how many requests the proxy has received for it since it started; empty without a proxy.

    Raises:
        Unreachable: the proxy does not answer.
        OpsError: something else answers at its address.
    """
    if not env.ai_providers.proxy:
        return {}
    found = _asked(env, "GET", "/health").get("received")
    if not isinstance(found, dict):
        raise OpsError(
            f"{env.ai_providers.control} is not the proxy",
            "run python -m tasks.ai.proxy there, or correct [ai_providers] control",
        )
    return {str(name): int(count) for name, count in found.items()}


@action(idempotent=True)
def fail_provider(
    permit: Permit, env: Environment, name: str, fault: ProviderFault = "500", delay_seconds: float = 0.0
) -> Fault:
    """From now on it fails every request in this way; `slow`: every answer is delayed.

    Raises:
        OpsError: the environment is not disposable, or its provider cannot be made to fail in this way.
    """
    require_allowed(env, permit, provider(env, name))
    began = datetime.now(UTC)
    _set(env, name, failing=True, fault=fault, delay_seconds=delay_seconds)
    return Fault(f"{name}: {MEANING[fault]}", began, datetime.now(UTC))


@action(idempotent=True)
def heal_providers(env: Environment, names: Sequence[str]) -> None:
    """All of them answer again; one that cannot be told so does not keep the others away. Giving back takes no permit:
    neither a lost lock nor a containment may leave them away.

    Raises:
        Unreachable, OpsError: one of them could not be told.
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
            f"{fault} needs the proxy: the providers' own control only makes them fail",
            "set [ai_providers] proxy and run python -m tasks.ai.proxy",
        )
    _asked(env, "POST", f"/control/{name}", {"failing": failing, **kind})
    state = read_provider_states.work(env).get(name)
    if (state == FAILING) is not failing:
        raise OpsError(
            f"{name} was told to {'fail' if failing else 'answer'}, and is {state}",
            "restart the providers: they forget it then",
        )


def _asked(
    env: Environment, method: str, path: str, body: Mapping[str, bool | str | float] | None = None
) -> dict[str, object]:
    control = env.ai_providers.control.rstrip("/")
    if not control:
        raise OpsError(f"nothing says how the AI providers of {env.name} are told to fail", PROXY_HINT)
    try:
        return call(method, control + path, {}, SECONDS, body, proxied=False)
    except Failed as error:
        kind = Unreachable if error.kind in ("unreachable", "hangs") else OpsError
        raise kind(
            f"the AI providers at {control}: {error.said}",
            "start them (the proxy: python -m tasks.ai.proxy); or correct [ai_providers] control",
        ) from None
