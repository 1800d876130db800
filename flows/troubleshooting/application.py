"""Why the application does not start, or is not healthy (appendix A)."""

from __future__ import annotations

from prefect import flow

from blocks.environment import Environment
from flows.troubleshooting.application_tree import walk
from flows.troubleshooting.diagnosis import Diagnosis
from runbook.report import Report
from runbook.run import runbook


@flow(name="diagnose-application", flow_run_name="diagnose-application {environment}")
def diagnose_application(environment: str) -> Report:
    """アプリケーション起動エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first: database and Redis behind it, whether backend and frontend
    run and answer, who has their ports, what the last 100 lines of their logs say, whether the database has the
    migrations that the code wants; and, where the backend does not run, a start in the foreground on a free port with
    its traceback. Run it first when the application does not start or its health check fails.

    It changes nothing: what is started here has a port of its own, runs none of uvicorn's start-up hooks (migrations,
    queues, schedules) unless `start_variables` in [application] say so, and is ended here with all that it started;
    what runs is left alone. For those seconds it holds the environment's lock, and it starts nothing beside a run that
    holds it, or where the environment is contained. It must run on the application's host. Evidence: the answers in
    their order, logs and environment by names, masked. It ends with links to the runbooks that help.

    Departs from the manual: `uvicorn --reload` on the live port would be in its way; `systemctl show
    --property=Environment` prints secrets.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Diagnose application", env) as report:
        found = Diagnosis(report, env)
        walk(found)
        found.close("backend and frontend run and answer well")
    return report
