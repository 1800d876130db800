"""Restoring Redis data (§2.3)."""
