"""URLs of Redis: what they mean, and that a refusal never repeats a password."""

import pytest

from app.store.cache.redis_tier import RedisTier
from app.store.cache.redis_url import RedisLocation, parse_redis_url

MEANINGS = {
    "redis://localhost": RedisLocation(address=("localhost", 6379)),
    "redis://localhost/": RedisLocation(address=("localhost", 6379)),
    "redis://10.0.0.1:7000/3": RedisLocation(address=("10.0.0.1", 7000), db=3),
    "redis://[::1]:7000": RedisLocation(address=("::1", 7000)),
    "rediss://cache.example.com": RedisLocation(address=("cache.example.com", 6379), tls=True),
    "redis://:pw@host": RedisLocation(address=("host", 6379), password="pw"),
    "redis://user:p%40%2F%3A@host": RedisLocation(address=("host", 6379), username="user", password="p@/:"),
    "redis://user:p@w@host": RedisLocation(address=("host", 6379), username="user", password="p@w"),
    "unix:///run/redis.sock": RedisLocation(socket_path="/run/redis.sock"),
    "unix://user:pw@/run/redis.sock?db=2": RedisLocation(
        socket_path="/run/redis.sock", username="user", password="pw", db=2
    ),
    "redis+sentinel://a:1,b,[::1]:3/prompts": RedisLocation(
        sentinels=(("a", 1), ("b", 26379), ("::1", 3)), master="prompts"
    ),
    "redis+sentinel://user:pw@a/my%20master/4": RedisLocation(
        sentinels=(("a", 26379),), master="my master", username="user", password="pw", db=4
    ),
}


@pytest.mark.parametrize("url", MEANINGS)
def test_what_urls_mean(url: str) -> None:
    assert parse_redis_url(url) == MEANINGS[url]


REFUSED = [
    "",
    "localhost:6379",
    "http://user:s3cret@host",
    "redis://",
    "redis:///0",
    "redis://user:s3cret@",
    "redis://user:s3cret@host:port",
    "redis://user:s3cret@host:99999",
    "redis://user:s3cret@host/zero",
    "redis://user:s3cret@host/0/1",
    "redis://user:s3cret@host/-1",
    "redis://user:s3/cret@host:6379/0",
    "redis://user:s3#cret@host:6379/0",
    "redis://user:s3?cret@host:6379/0",
    "redis://user:s3cret@host/0?socket_timeout=5",
    "redis://user:s3cret@a:1,b:2/0",
    "redis://user:s3cret@[::1",
    "redis://user:s3cret@host\u2100",
    "unix://user:s3cret@",
    "unix://user:s3cret@/",
    "unix://run/redis.sock",
    "unix:///run/redis.sock?password=s3cret",
    "unix:///run/redis.sock?db=1&db=2",
    "redis+sentinel://user:s3cret@a:1,b:2",
    "redis+sentinel://user:s3cret@a:1,b:2/",
    "redis+sentinel://user:s3cret@a:1,,b:2/prompts",
    "redis+sentinel://user:s3cret@a:x/prompts",
    "redis+sentinel://user:s3cret@a:1/prompts/zero",
]


@pytest.mark.parametrize("url", REFUSED)
def test_a_refusal_is_kind_and_keeps_the_secret(url: str) -> None:
    with pytest.raises(ValueError, match=r"the Redis URL .*for example redis://") as caught:
        RedisTier(url)
    shown: BaseException | None = caught.value
    assert "cret" not in str(shown)
    assert shown.__suppress_context__, "the reason below may hold a piece of the URL"


def test_a_location_may_be_printed() -> None:
    assert "s3cret" not in repr(parse_redis_url("redis://user:s3cret@host"))
