"""Prefect's own server: its database, its upgrade, suspended runs."""
