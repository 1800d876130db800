"""Failover of PostgreSQL (§8.3): fencing, replay, promotion, rejoin."""
