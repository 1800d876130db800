"""Docker images and the deployed version (§4.1, §4.2)."""
