"""§1 of the manual: PostgreSQL."""
