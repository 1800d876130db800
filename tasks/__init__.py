"""What can be read from, or done to, one resource."""
