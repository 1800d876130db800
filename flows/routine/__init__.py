"""§7 of the manual: the working day."""
