"""§7 of the manual: routine maintenance."""
