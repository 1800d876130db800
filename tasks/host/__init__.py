"""A host: disk, load, clock, ports and services."""
