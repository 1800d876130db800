"""The application started beside its service, to see why that does not start: when that may be, and what it told."""

from __future__ import annotations

from flows.troubleshooting.diagnosis import Diagnosis
from runbook import containment
from runbook.lock import hold
from runbook.markdown import code, escaped, fenced
from runbook.render import duration
from runbook.report import Evidence
from tasks.start_trial import HOOKS, Trial, start_in_foreground

QUESTION = "does it start in the foreground?"


def start_beside(found: Diagnosis) -> Trial | None:
    """Under the environment's lock: what is started here must not meet a restore, which stopped the service on purpose,
    nor do anything in an environment that is contained. None where it was not to be."""
    env = found.env
    if not env.application.start_command:
        found.told(QUESTION, "not tried: [application] start_command is not configured")
        return None
    with found.asking(QUESTION):
        if contained := containment.read(env.name, env.reports_directory):
            raise contained.refusal(env.name)
        with hold(env.name, env.reports_directory, found.report.runbook, "maintenance"):
            trial = start_in_foreground(env.application)
        _tell(found, trial)
        return trial
    return None


def _tell(found: Diagnosis, trial: Trial) -> None:
    how = "it serves" if trial.served else f"it ended with exit code {trial.code}" if trial.code is not None \
        else "it neither served nor ended"  # fmt: skip
    hooks = "" if trial.hooks else f", without its start-up hooks ({HOOKS}=off)"
    told = f"{how} after {duration(trial.seconds)}{hooks}, with these variables: {trial.variables}"
    down = "what keeps the service down is not in its code" if trial.hooks else \
        "its code and settings load; its hooks, its unit or its user keep the service down"  # fmt: skip
    found.told(QUESTION, f"{told}: {down}" if trial.served else told)
    head = f"{code(trial.command)} — {escaped(told)}\n\n"
    found.report.attach(Evidence("Foreground start on a free port", text=head + fenced(trial.output or "(nothing)")))
