"""Guided checklists for work that only people can do (§7.1, §8.4)."""

from __future__ import annotations

from blocks.environment import Environment
from flows.routine.checklist import findings
from flows.routine.checklist.history import Past, drilled, last_time
from flows.routine.checklist.questions import Answered, Asking, ask, launched_at
from flows.routine.checklist.texts import DEFAULT, ChecklistName
from flows.routine.checklist.texts import checklist as find_checklist
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.language.say import use_language
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName


@flow(name="run-checklist", flow_run_name=RunName("run-checklist {environment} {checklist}"))
def run_checklist(
    environment: str, checklist: ChecklistName = DEFAULT, due: str = "", drill_date: str = "", taken_over: str = ""
) -> Report:
    """チェックリスト: DR訓練の準備・当日・訓練後、監査、レビュー (§8.4, §7.1)

    Goes through work that only people can do, box by box. The run suspends, and the UI shows a form for each phase.
    Choose Resume in the menu of the run's page. For each box fill in the result (done, not done, not applicable), who
    did it, a note and a link, then submit. After the last phase there is a report with all answers. If a worker or the
    server restarts in between, the run continues where it was.

    Run it a week before a drill (drill_preparation), on the day (drill_day) and within a week after it
    (drill_follow_up); yearly (security_audit, architecture_review) and every quarter (cost_review). An undone box is
    WARN, or CRITICAL if it is mandatory. A late answer is WARN. Each box shows its last answer.

    It changes nothing, and holds no lock: a run may wait for weeks. To drop it, cancel it: it leaves no report. If a
    run failed before its last answer (a host died), run it again with its id in taken_over. Evidence: who answered
    what, when, with notes and links.

    Args:
        environment: Environment (lab, staging, production …)
        checklist: drill_preparation, drill_day, drill_follow_up, security_audit, architecture_review or cost_review
        due: Last day to answer (e.g. 2026-03-31, in the environment's time zone). Empty: counted from the day of the
            drill, else of the launch
        drill_date: Day of the drill (e.g. 2026-03-31, in the environment's time zone). Preparation is due 7 days
            before, follow-up 7 days after. Empty: use due
        taken_over: ID of a run that failed halfway: its answers are filled in. Empty: begin with an empty form
    """
    env = Environment.find(environment)
    past, found = _asked(env, checklist, due, drill_date, taken_over)
    with runbook("Run checklist", env) as report:
        if isinstance(found, OpsError):
            raise found
        findings.report_results(report, env, found, past)
    return report


def _asked(
    env: Environment, name: ChecklistName, due: str, drill_date: str, taken_over: str
) -> tuple[Past | None, Answered | OpsError]:
    """Ask before the report is opened: otherwise a report would be filed at each suspension."""
    try:
        chosen, launched = find_checklist(name), launched_at()
        last_day = chosen.due(launched.astimezone(env.zone).date(), due, drill_date)
        past = last_time(env, chosen)
        with use_language(env.language):
            return past, ask(Asking(env, chosen, launched, last_day, past, drilled(env, chosen), taken_over))
    except OpsError as error:
        return None, error
