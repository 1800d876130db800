"""Alembic's migrations (§1.1): read, run, rehearsed on a copy, written."""
