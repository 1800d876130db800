"""A PostgreSQL server: its version, settings, roles and log-ins."""
