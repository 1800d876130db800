"""The newest moments that a system could be brought back to now, by every means there is (§8.1)."""
