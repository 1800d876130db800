"""Which addresses are this machine's."""

from __future__ import annotations

import psutil

from blocks.hosts import is_here


def test_own_addresses_and_names_are_here_and_others_are_not() -> None:
    own = [
        one.address.partition("%")[0]
        for found in psutil.net_if_addrs().values()
        for one in found
        if one.family.name in ("AF_INET", "AF_INET6")
    ]
    assert own
    assert all(is_here(address) for address in (*own, "", "localhost", "127.0.0.2", "/run/postgresql"))
    assert not any(is_here(address) for address in ("192.0.2.1", "2001:db8::1", "no-such-host.invalid"))
