"""Headers of every answer, of those to requests without a route too."""

import os
import re
from collections.abc import Iterable

_ID_BYTES, _IDS_AT_ONCE = 16, 256
_random: list[str] = []  # ids that nothing has yet
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")

# The console's pages send a policy of their own; no other answer is a page.
_DEFAULTS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
)


def complete_headers(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """Return the headers (names in lower case), the request's id, and each default that isn't set."""
    kept = [header for header in headers if header[0] != b"x-request-id"]
    names = {name for name, _ in kept}
    missing = [header for header in _DEFAULTS if header[0] not in names]
    return [*kept, (b"x-request-id", request_id.encode()), *missing]


def request_id(given: str = "") -> str:
    """Return the client's id where it is harmless in a header and a log, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else _own_id()


def _own_id() -> str:
    """Return a random id. The system is asked for many at once, since each call gives up Python's lock."""
    if not _random:
        data = os.urandom(_ID_BYTES * _IDS_AT_ONCE).hex()
        _random.extend(data[begin : begin + 2 * _ID_BYTES] for begin in range(0, len(data), 2 * _ID_BYTES))
    return _random.pop()
