"""The files of tests that take longest are begun first (a plugin): under `--dist loadfile` a file is one worker's, and
a long one that is begun last is waited for while the other processor is idle. By itself xdist begins with the files
that have most tests, and the longest have few."""

from __future__ import annotations

from collections import Counter

import pytest

# More than about 50 s of `make test`, and a minute of `make test-system`, the longest first. A file that is missing here
# costs time only.
LONGEST = (
    "recovery/full/test_secrets.py",
    "recovery/objectives/test_thirty_days_of_wal.py",
    "system/test_full_restore.py",
    "recovery/full/test_full_restore.py",
    "stranger/test_guide.py",
    "system/test_compose.py",
    "system/test_prefect_upgrade.py",
    "system/test_systemd_services.py",
    "application/test_patching.py",
    "system/test_certificates.py",
    "system/docker/test_docker_routine.py",
    "system/test_pgbackrest.py",
    "application/test_dependencies.py",
    "recovery/redis/test_redis_failover.py",
    "recovery/point/test_point_in_time.py",
    "database/restore/test_restore.py",
    "redis/restore/test_network.py",
    "infrastructure/test_prefect_server.py",
    "recovery/region/test_region_failover.py",
    "lab/test_deployed.py",
    "redis/restore/test_isolation.py",
    "database/migrations/test_migrations_rehearsal.py",
    "recovery/postgres/test_postgres_failover_refused.py",
    "recovery/postgres/test_postgres_failover_killed.py",
    "lab/test_lab.py",
    "database/restore/test_tables.py",
    "recovery/objectives/test_thirty_days.py",
    "redis/restore/test_prefixes.py",
    "redis/settings/test_overrides.py",
    "recovery/postgres/test_postgres_failover.py",
    "redis/backup/test_snapshot.py",
    "application/test_broken_tools.py",
    "infrastructure/test_unpack.py",
    "runbook/guard/test_lease.py",
    "redis/restore/test_undo.py",
    "recovery/drills/test_drill_corruption.py",
    "stranger/test_restore.py",
    "redis/settings/test_settings.py",
    "deployments/test_failures.py",
    "redis/restore/test_restore.py",
    "recovery/objectives/test_objectives.py",
    "recovery/drills/test_drill_database.py",
    "redis/backup/test_aof_backup.py",
    "deployments/test_schedules.py",
    "database/backup/test_copies.py",
    "recovery/redis/test_redis_failover_late.py",
    "routine/checklist/test_checklist.py",
    "recovery/forensics/test_transactions.py",
    "monitoring/test_metrics.py",
)
_RANKS = {f"tests/{name}": rank for rank, name in enumerate(LONGEST)}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The same in every worker; within a file the order stays."""
    files = [item.nodeid.partition("::")[0] for item in items]
    numbers = Counter(files)
    of_item = {
        item: (_RANKS.get(file, len(_RANKS)), -numbers[file], file) for item, file in zip(items, files, strict=True)
    }
    items.sort(key=lambda item: of_item[item])
