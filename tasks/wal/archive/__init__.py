"""Archived WAL: shipped, checked for gaps, fetched, pruned."""
