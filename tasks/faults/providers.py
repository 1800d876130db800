"""AI providers taken away, one by one, and given back: where a disposable environment's own ones can be told to fail.

They take `POST {control}/control/{provider} {"failing": true}` and tell by `GET {control}/health` which of them do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from blocks.environment import Environment
from runbook.errors import OpsError, Unreachable
from runbook.kinds import action, probe
from runbook.permit import Permit
from tasks.ai.answer import Failed
from tasks.ai.http import call
from tasks.faults.disposable import Fault, require_allowed, require_disposable

SECONDS = 10.0
FAILING = "failing"


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


@action(idempotent=True)
def fail_provider(permit: Permit, env: Environment, name: str) -> Fault:
    """From now on it refuses every request.

    Raises:
        OpsError: the environment is not disposable, or its provider cannot be told to fail.
    """
    require_allowed(env, permit, provider(env, name))
    began = datetime.now(UTC)
    _set(env, name, failing=True)
    return Fault(f"{name} refuses every request", began, datetime.now(UTC))


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


def _set(env: Environment, name: str, *, failing: bool) -> None:
    _asked(env, "POST", f"/control/{name}", {"failing": failing})
    state = read_provider_states.work(env).get(name)
    if (state == FAILING) is not failing:
        raise OpsError(f"{name} was told to {'fail' if failing else 'answer'}, and is {state}",
                       "restart the providers: they forget it then")  # fmt: skip


def _asked(env: Environment, method: str, path: str, body: Mapping[str, bool] | None = None) -> dict[str, object]:
    control = env.ai_providers.control.rstrip("/")
    if not control:
        raise OpsError(f"nothing says how the AI providers of {env.name} are told to fail",
                       "name the address in [ai_providers] control; real providers cannot be taken away")  # fmt: skip
    try:
        return call(method, control + path, {}, SECONDS, body, proxied=False)
    except Failed as error:
        kind = Unreachable if error.kind in ("unreachable", "hangs") else OpsError
        raise kind(
            f"the AI providers at {control}: {error.said}", "start them; or correct [ai_providers] control"
        ) from None
