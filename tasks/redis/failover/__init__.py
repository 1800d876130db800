"""Failover of a data set: the servers, the pause of writes, the promotion, and test writes (§8.3)."""
