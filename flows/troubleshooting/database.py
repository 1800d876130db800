"""Why the database cannot be reached or does not answer as it should (appendix A)."""

from __future__ import annotations

from prefect import flow

from blocks.environment import Environment
from flows.troubleshooting.database_inside import walk_inside
from flows.troubleshooting.database_outside import walk_outside
from flows.troubleshooting.diagnosis import Diagnosis
from runbook.report import Report
from runbook.run import runbook


@flow(name="diagnose-database", flow_run_name="diagnose-database {environment}")
def diagnose_database(environment: str) -> Report:
    """データベース接続エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first: whether the host and the port can be reached and the
    process lives, whether the server takes connections (starting, in recovery, full), whether the environment's logins
    and the application's own are taken, whether it can write (disk, read only), who blocks whom, who sits idle in a
    transaction, what is left of max_connections, whether commits wait and WAL gets away. Run it first when the
    application reports database errors, and when replication lags.

    It changes nothing (a temporary table is rolled back), takes no lock, and works with the database down. Evidence:
    the answers in their order, the last 100 lines of the log and the environment by names, masked. It ends with links
    to the runbooks that help, filled in, and what must be undone later.

    Departs from the manual: `max_connections` takes effect at a restart only, `pg_reload_conf()` does nothing for it;
    lines of pg_stat_activity are not all clients.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Diagnose database", env) as report:
        found = Diagnosis(report, env)
        if walk_outside(found):
            walk_inside(found)
        found.close("the database takes connections and writes, and nobody waits")
    return report
