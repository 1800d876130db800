"""How a run is called in Prefect: `<runbook> <environment> <what>`."""

from __future__ import annotations

from collections.abc import Sequence

NOW = "now"
MOST_CHARACTERS = 60


class RunName(str):
    """A template that Prefect fills with a run's parameters: `RunName("restore-files {environment} {backup}")`.

    Empty parameters are left out, and lists are joined. A run of a runbook with `confirm` is a `plan` or `confirmed`.
    One without any object or window reads the current state: `now`.
    """

    def format(self, *args: object, **parameters: object) -> str:
        """The name. Prefect calls this with the run's parameters."""
        what = super().format(*args, **{name: _text(value) for name, value in parameters.items()}).split()
        if "confirm" in parameters:
            what.append("confirmed" if parameters["confirm"] else "plan")
        return " ".join(what if len(what) > 2 else [*what, NOW])


def _text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(map(str, value))
    text = str(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
