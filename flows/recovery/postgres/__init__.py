"""Failover of PostgreSQL, and the old primary's return (§8.3)."""
