"""Reports of the past, evidence archives, records of changed settings."""
