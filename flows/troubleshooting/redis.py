"""Why Redis cannot be reached or does not answer as it should (appendix A)."""

from __future__ import annotations

from prefect import flow

from blocks.environment import Environment
from flows.troubleshooting.diagnosis import Diagnosis
from flows.troubleshooting.redis_tree import walk
from runbook.report import Report
from runbook.run import runbook


@flow(name="diagnose-redis", flow_run_name="diagnose-redis {environment}")
def diagnose_redis(environment: str) -> Report:
    """Redis接続エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first: whether the host and the port can be reached and the
    process lives, whether it takes the password and another client (maxclients), whether it is loading, whether it
    takes writes (memory full with noeviction, a save that failed, a replica), and how full memory and places are. Run
    it first when the application reports errors of Redis.

    It changes nothing: the write that it tries (SET … XX of a key that is not there) does nothing where it is taken.
    It works with Redis down. Evidence: the answers in their order, the last 100 lines of the log and the environment by
    names, masked. It ends with links to the runbooks that help, filled in, and what must be undone later.

    Departs from the manual: never FLUSHDB, which wipes sessions and queues with the cache: clear-cache by prefix. Lines
    of CLIENT LIST are not the number that counts.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Diagnose Redis", env) as report:
        found = Diagnosis(report, env)
        walk(found)
        found.close("Redis answers, takes writes, and has room")
    return report
