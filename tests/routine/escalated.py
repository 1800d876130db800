"""In the place of the escalation: what it was launched with is in the run's parameters."""

from prefect import flow


@flow(name="escalate")
def escalate(
    environment: str, severity: str = "normal", what: str = "", owner: str = "", run: str = "", key: str = ""
) -> None:
    """Nothing."""
