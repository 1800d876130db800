"""Redis settings: the manual's, the running ones, the file's, and their changes (§2.3, §2.4)."""
