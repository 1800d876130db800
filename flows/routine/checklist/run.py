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
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName


@flow(name="run-checklist", flow_run_name=RunName("run-checklist {environment} {checklist}"))
def run_checklist(
    environment: str, checklist: ChecklistName = DEFAULT, due: str = "", drill_date: str = "", taken_over: str = ""
) -> Report:
    """チェックリスト: DR訓練の準備・当日・訓練後、監査、レビュー (§8.4, §7.1)

    人にしかできない作業を1項目ずつ確認する。起動すると run は Suspended になり、フェーズごとのフォームが UI に出る。
    run のページのメニューで Resume を選び、項目ごとに 実施・未実施・対象外、実施者、メモ、リンクを記入して送る。
    最後のフェーズまで答えると、結果のレポートができる。答えている間に worker や server が再起動しても続きから再開する。

    Run it a week before a drill (drill_preparation), on the day (drill_day) and within a week after it
    (drill_follow_up); yearly (security_audit, architecture_review) and every quarter (cost_review). An undone box is
    WARN, or CRITICAL if it is mandatory. A late answer is WARN. Each box shows its last answer.

    It changes nothing, and holds no lock: a run may wait for weeks. To drop it, cancel it: it leaves no report. If a
    run failed before its last answer (a host died), run it again with its id in taken_over. Evidence: who answered
    what, when, with notes and links.

    Args:
        environment: 対象の環境
        checklist: drill_preparation 事前準備、drill_day 訓練当日、drill_follow_up 訓練後、
            security_audit セキュリティ監査、architecture_review アーキテクチャレビュー、cost_review コストレビュー
        due: 回答の期限 (例 2026-03-31、環境の時間帯)。空なら訓練日から、それもなければ起動日から数える
        drill_date: 訓練日
            (例 2026-03-31、環境の時間帯)。準備の期限は7日前、訓練後の期限は7日後になる。空なら due に従う
        taken_over: 途中で失敗した run の id。その回答をフォームに入れておく。空なら白紙から
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
        return past, ask(Asking(env, chosen, launched, last_day, past, drilled(env, chosen), taken_over))
    except OpsError as error:
        return None, error
