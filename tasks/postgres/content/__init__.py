"""The content of a database, and the comparison of two databases."""
