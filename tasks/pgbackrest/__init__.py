"""pgBackRest, where the environment says that it takes the base backups and archives the WAL (§8.2)."""
