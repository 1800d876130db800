"""Failover of Redis with Sentinels (§8.3)."""
