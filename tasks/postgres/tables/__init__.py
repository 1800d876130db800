"""Single tables: find, compare, and replace their rows in one transaction."""
