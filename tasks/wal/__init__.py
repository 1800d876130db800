"""WAL: its format, the archive, continuity, and reading its content."""
