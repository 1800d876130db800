"""Prefect's clients that are opened in a block try less, and nothing else of Prefect's settings changes."""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_CLIENT_MAX_RETRIES,
    get_current_settings,
    temporary_settings,
)
from prefect.settings.legacy import Settings

from runbook.guard.brief import asked_briefly, patience

CHANGED = {"PREFECT_API_REQUEST_TIMEOUT", "PREFECT_CLIENT_MAX_RETRIES"}


def told(settings: Settings) -> dict[str, str]:
    return {name: value for name, value in settings.to_environment_variables().items() if name not in CHANGED}


def test_a_client_waits_and_tries_as_often_as_the_block_says() -> None:
    before = get_current_settings()
    with asked_briefly(3, retries=1):
        inside = get_current_settings()
        assert (inside.api.request_timeout, inside.client.max_retries) == (3, 1)
        with get_client(sync_client=True) as client:
            assert client._client.timeout.read == 3
        with patience(retries=0):  # the time stays
            assert get_current_settings().api.request_timeout == 3
            assert get_current_settings().client.max_retries == 0
        assert get_current_settings() is inside
    assert get_current_settings() is before


def test_every_other_setting_is_as_prefect_s_own_way_leaves_it() -> None:
    with temporary_settings({PREFECT_API_REQUEST_TIMEOUT: 3.0, PREFECT_CLIENT_MAX_RETRIES: 1}):
        theirs = get_current_settings()
    with asked_briefly(3, retries=1):
        ours = get_current_settings()
    assert told(ours) == told(theirs)
    assert ours.to_environment_variables(exclude_unset=True).keys() >= CHANGED, "a process that is started gets them"
