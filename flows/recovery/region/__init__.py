"""Failover to another region (§8.3)."""
