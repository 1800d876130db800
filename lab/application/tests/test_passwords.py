"""The backend's own tests, which prove a branch in the application's checkout: no server is needed."""

from __future__ import annotations

import unittest

from grc_backend.passwords import hash_password, verify_password  # type: ignore[import-not-found]


class Passwords(unittest.TestCase):
    def test_a_password_fits_its_own_hash_only(self) -> None:
        stored = hash_password("面接-4713")
        assert verify_password("面接-4713", stored)
        assert not verify_password("面接-4714", stored)

    def test_what_is_no_hash_fits_no_password(self) -> None:
        assert not verify_password("", "!")
