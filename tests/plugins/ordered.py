"""The files of tests that take longest are begun first (a plugin): under `--dist loadfile` a file is one worker's, and
a long one that is begun last is waited for while the other processor is idle. By itself xdist begins with the files
that have most tests, and the longest have few."""

from __future__ import annotations

from collections import Counter

import pytest

# More than about 45 s of `make test`, of what `make test-all` adds, or of `make test-system`, the longest first. A file
# that is missing here costs time only.
LONGEST = (
    "system/test_full_restore.py",
    "stranger/test_guide.py",
    "lab/test_deployed.py",
    "lab/test_zombies.py",
    "recovery/full/test_full_restore.py",
    "stranger/test_plan.py",
    "system/test_compose.py",
    "infrastructure/test_prefect_server.py",
    "system/test_prefect_upgrade.py",
    "system/test_systemd_services.py",
    "recovery/drills/test_drill_declared.py",
    "redis/restore/test_network.py",
    "recovery/redis/test_redis_failover.py",
    "system/test_certificates.py",
    "recovery/point/test_point_in_time.py",
    "application/test_patching.py",
    "system/docker/test_docker_routine.py",
    "recovery/postgres/test_postgres_failover_refused.py",
    "database/restore/test_tables.py",
    "system/test_pgbackrest.py",
    "recovery/drills/test_drill_database.py",
    "redis/restore/test_isolation.py",
    "recovery/objectives/test_thirty_days.py",
    "lab/test_lab.py",
    "recovery/region/test_region_failover.py",
    "application/test_dependencies.py",
    "recovery/postgres/test_postgres_failover_killed.py",
    "database/backup/test_stores.py",
    "database/restore/test_restore.py",
    "redis/cache/test_cache.py",
    "ai_providers/test_in_lab.py",
    "tasks/test_integrity.py",
    "runbook/guard/test_lease.py",
    "database/test_killed_server.py",
    "database/backup/test_waiting.py",
    "database/backup/test_copies.py",
    "monitoring/test_metrics.py",
    "deployments/test_schedules.py",
    "s3/test_upload_faults.py",
    "recovery/point/test_archiver.py",
    "redis/settings/test_overrides.py",
    "redis/backup/test_snapshot.py",
    "recovery/drills/test_drill_release.py",
    "redis/restore/test_prefixes.py",
    "database/migrations/test_migrations.py",
    "deployments/test_failures.py",
    "s3/test_objects.py",
    "routine/checklist/test_checklist.py",
    "application/test_broken_tools.py",
    "redis/settings/test_settings.py",
    "database/server/test_replication.py",
    "recovery/forensics/test_containment.py",
    "recovery/postgres/test_postgres_failover.py",
    "recovery/objectives/test_thirty_days_of_wal.py",
    "s3/test_upload.py",
    "redis/backup/test_aof_backup.py",
    "monitoring/test_metrics_automations.py",
    "recovery/drills/test_drill_corruption.py",
    "redis/restore/test_restore.py",
    "redis/restore/test_undo.py",
    "database/migrations/test_migrations_rehearsal.py",
    "recovery/point/test_clusters.py",
    "runbook/guard/test_pins.py",
    "database/backup/test_verify_and_prune.py",
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
