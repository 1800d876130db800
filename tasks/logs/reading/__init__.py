"""Log files read as rows of a table."""
