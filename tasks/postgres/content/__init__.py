"""What a database contains, and whether two databases contain the same."""
