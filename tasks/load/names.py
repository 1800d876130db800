"""Names of measured requests that differ from the titles of their steps. Locust's process imports this module too."""


def limited(title: str) -> str:
    """The name of an AI request that the application's rate limit refused."""
    return f"{title} (rate limit 429)"
