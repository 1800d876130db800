"""Vacuum and indexes (§1.3, §1.4)."""
