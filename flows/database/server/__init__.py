"""The database server: sessions, settings, replication, corruption checks."""
