"""The steps of a migration: rehearsed, applied, reviewed (§1.1)."""
