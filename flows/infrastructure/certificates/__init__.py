"""TLS certificates (§4.3)."""
