"""The files of tests that take longest are begun first (a plugin): under `--dist loadfile` a file is one worker's, and
a long one that is begun last is waited for while the other processor is idle. By itself xdist begins with the files
that have most tests, and the longest have few."""

from __future__ import annotations

from collections import Counter

import pytest

# More than about 30 s of `make test`, and a minute of `make test-system`, the longest first. A file that is missing here
# costs time only.
LONGEST = (
    "system/test_full_restore.py",
    "recovery/test_full_restore.py",
    "stranger/test_guide.py",
    "system/test_compose.py",
    "system/test_prefect_upgrade.py",
    "system/test_systemd_services.py",
    "application/test_patching.py",
    "system/test_certificates.py",
    "system/test_docker_routine.py",
    "system/test_pgbackrest.py",
    "application/test_dependencies.py",
    "recovery/test_redis_failover.py",
    "infrastructure/test_prefect_server.py",
    "runbook/test_lease.py",
    "database/test_restore.py",
    "lab/test_lab.py",
    "lab/test_deployed.py",
    "recovery/test_point_in_time.py",
    "recovery/test_region_failover.py",
    "recovery/test_postgres_failover.py",
    "recovery/test_thirty_days.py",
    "redis/test_isolation.py",
    "database/test_tables.py",
    "redis/test_restore.py",
    "database/test_stores.py",
    "database/test_migrations.py",
    "redis/test_prefixes.py",
    "database/test_verify_and_prune.py",
    "recovery/test_postgres_failover_refused.py",
    "blocks/test_services.py",
    "logs/test_check.py",
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
