"""Prefect's own server: backup, restore, upgrade, history."""
