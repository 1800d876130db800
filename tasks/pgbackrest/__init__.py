"""pgBackRest, for environments where it takes the base backups and archives the WAL (§8.2)."""
