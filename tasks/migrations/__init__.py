"""Alembic migrations (§1.1): read, run, rehearsed on a copy, created."""
