"""The application's logs: found, read, searched, removed."""
