"""A Docker Engine and a registry: fixtures of the system tests alone."""

from tests.fixtures.engine import docker_host, engine, environment, registry

__all__ = ["docker_host", "engine", "environment", "registry"]
