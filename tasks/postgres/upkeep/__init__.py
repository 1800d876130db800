"""Maintenance of a database: vacuum, indexes, corruption checks."""
