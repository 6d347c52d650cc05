"""Parse a Redis URL: an address, and the user to log in as.

    redis://[user:password@]host[:port][/db]        rediss:// is the same over TLS
    unix://[user:password@]/path/to/redis.sock[?db=0]
    redis+sentinel://[user:password@]host[:port][,host[:port]...]/master name[/db]

A URL holds a password, so no message of this module repeats any part of it.
"""

import re
from dataclasses import dataclass, field, replace
from typing import NoReturn
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

_REDIS_PORT, _SENTINEL_PORT = 6379, 26379
_SENTINEL_SCHEME = "redis+sentinel"
_SCHEMES = ("redis", "rediss", "unix", _SENTINEL_SCHEME)
_DB = re.compile(r"[0-9]{1,4}")

Address = tuple[str, int]  # host, port


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisLocation:
    """A parsed URL. `address`, `socket_path` or `sentinels` with `master`: one of the three is given."""

    address: Address | None = None
    socket_path: str | None = None
    sentinels: tuple[Address, ...] = ()
    master: str | None = None
    tls: bool = False
    username: str | None = None  # of Redis itself; sentinels get none
    password: str | None = field(default=None, repr=False)
    db: int = 0


def parse_redis_url(url: str) -> RedisLocation:
    """Parse a URL of the forms above. Raise ValueError with a message for the user."""
    try:
        parts = urlsplit(url.replace("[", "%5B").replace("]", "%5D"))  # else several hosts may be refused
    except ValueError:  # its message holds parts of the URL
        _refuse("is not a URL")
    if parts.scheme not in _SCHEMES:
        _refuse(f"must begin with one of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    if parts.fragment or (parts.query and parts.scheme != "unix"):
        _refuse("has a '?' or '#' where none is allowed; in a password write them as %3F and %23")
    credentials, _, hosts = parts.netloc.rpartition("@")
    hosts = hosts.replace("%5B", "[").replace("%5D", "]")
    username, _, password = (unquote(text) for text in credentials.partition(":"))
    return replace(_place(parts, hosts), username=username or None, password=password or None)


def _place(parts: SplitResult, hosts: str) -> RedisLocation:
    if parts.scheme == "unix":
        return _unix(parts, hosts)
    if parts.scheme == _SENTINEL_SCHEME:
        return _sentinel(parts, hosts)
    address = _address(hosts, _REDIS_PORT)
    return RedisLocation(address=address, tls=parts.scheme == "rediss", db=_db(parts.path.removeprefix("/")))


def _unix(parts: SplitResult, hosts: str) -> RedisLocation:
    query = parse_qs(parts.query, keep_blank_values=True)
    if hosts or len(parts.path) < 2:
        _refuse("must name a socket by its absolute path")
    if not query.keys() <= {"db"} or len(query.get("db", [""])) > 1:
        _refuse("can only have '?db=' after the path of a socket")
    return RedisLocation(socket_path=unquote(parts.path), db=_db(query.get("db", [""])[0]))


def _sentinel(parts: SplitResult, hosts: str) -> RedisLocation:
    master, _, db = parts.path.removeprefix("/").partition("/")
    if not master:
        _refuse("must name the master after the sentinels")
    sentinels = tuple(_address(host, _SENTINEL_PORT) for host in hosts.split(","))
    return RedisLocation(sentinels=sentinels, master=unquote(master), db=_db(db))


def _address(text: str, default_port: int) -> Address:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        _refuse("has an invalid host or port; in a password write ':' as %3A and '/' as %2F")
    if not host or parts.path or "@" in parts.netloc or "," in parts.netloc:
        _refuse("must name a host; in a password write '/' as %2F and '@' as %40")
    return unquote(host), default_port if port is None else port


def _db(text: str) -> int:
    if not text:
        return 0
    if not _DB.fullmatch(text):
        _refuse("must name the database by a number; in a password write '/' as %2F")
    return int(text)


def _refuse(why: str) -> NoReturn:
    raise ValueError(f"the Redis URL {why}; for example redis://user:password@localhost:6379/0") from None
