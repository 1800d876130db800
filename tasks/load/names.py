"""The names under which a load test's requests are measured, where they are not their steps' titles. Locust's program
reads them too."""


def limited(title: str) -> str:
    """A step that asks an AI, where the application's own limit refused it."""
    return f"{title} (利用制限 429)"
