"""Replication to standbys, synchronous commits, transaction ids."""
