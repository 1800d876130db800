"""Dumps: taken in one snapshot, read, and loaded again."""
