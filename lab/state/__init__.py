"""What a lab remembers, and where it is."""
