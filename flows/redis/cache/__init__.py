"""Clearing caches (§2.2)."""
