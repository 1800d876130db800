"""Password hashes: scrypt with its parameters and salt beside the hash, ``scrypt$n$r$p$salt$hash``."""

from __future__ import annotations

import hashlib
import hmac
import secrets

_COST, _BLOCK_SIZE, _PARALLELISM = 2**14, 8, 1


def hash_password(password: str) -> str:
    """Return a new salted hash of `password`; takes about 50 ms of CPU, on purpose."""
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt, _COST, _BLOCK_SIZE, _PARALLELISM)
    return f"scrypt${_COST}${_BLOCK_SIZE}${_PARALLELISM}${salt.hex()}${digest.hex()}"


def verify_password(password: str, stored: str) -> bool:
    """Say whether `password` belongs to the hash `stored`; what is not such a hash (``!``) fits no password."""
    try:
        scheme, cost, block_size, parallelism, salt, digest = stored.split("$")
        if scheme != "scrypt":
            return False
        actual = _scrypt(password, bytes.fromhex(salt), int(cost), int(block_size), int(parallelism))
        return hmac.compare_digest(actual, bytes.fromhex(digest))
    except ValueError:
        return False


def _scrypt(password: str, salt: bytes, cost: int, block_size: int, parallelism: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=cost, r=block_size, p=parallelism, maxmem=64 * 2**20)
