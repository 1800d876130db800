"""§8 of the manual: disaster recovery."""
