"""Pages of a real server, as the server itself verifies them."""

from __future__ import annotations

from pathlib import Path

from tasks.cluster.recovery_pages import checksum_of, is_valid
from tasks.wal.format.pages import PAGE_BYTES
from tests.fixtures.servers import PostgresServer


def test_every_page_of_a_server_is_valid_and_a_flipped_bit_is_not(postgres_server: PostgresServer) -> None:
    postgres_server.sql("CHECKPOINT")
    ((data, path, checked),) = postgres_server.sql(
        "SELECT current_setting('data_directory'), pg_relation_filepath('pg_proc'), current_setting('data_checksums')"
    )
    assert checked == "on"
    content = (Path(data) / path).read_bytes()
    pages = [content[at : at + PAGE_BYTES] for at in range(0, len(content), PAGE_BYTES)]
    assert len(pages) > 50
    assert all(is_valid(page, number, checked=True) for number, page in enumerate(pages))
    assert not is_valid(pages[1], 2, checked=True), "a page in another one's place"
    for at in (20, 5000, PAGE_BYTES - 1):
        changed = bytearray(pages[1])
        changed[at] ^= 1
        assert checksum_of(bytes(changed), 1) != checksum_of(pages[1], 1)
        assert not is_valid(bytes(changed), 1, checked=True)
    assert is_valid(bytes(PAGE_BYTES), 7, checked=True), "a new page"
