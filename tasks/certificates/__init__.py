"""Certificates: their files, the servers that show them, and certbot."""
