"""§2 of the manual: Redis."""
