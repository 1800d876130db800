"""Services of a host, by service manager."""
