"""Dumps: taken in one snapshot, read, and restored."""
