"""Redis's settings (§2.3, §2.4): the manual's, the running ones, those of the file, and their changes."""
