"""After a 2xx every replica serves the new version, whatever Redis does."""

import itertools
import json
from collections.abc import Callable

import pytest
from redis import Redis

from app.prompt import Prompt
from app.store.cache.redis_tier import KEY_PREFIX
from app.store.cache.release_hints import CHANNEL
from tests.cli.conftest import Server
from tests.replicas.conftest import Cluster, soft_prompt
from tests.store.fault_proxy import Fault

TASKS = ("a", "b", "c")
_seeds = itertools.count()


def nothing(prompt: Prompt, task_id: str) -> None:
    """Redis is left alone."""


def upload_and_ask(cluster: Cluster, uploads: int, spoil: Callable[[Prompt, str], None] = nothing) -> int:
    """How many uploads all replicas served with their next requests."""
    fresh = 0
    for _ in range(uploads):
        task_id, prompt = cluster.dice.choice(TASKS), soft_prompt(next(_seeds))
        uploaded = cluster.upload(task_id, prompt)
        spoil(prompt, task_id)
        fresh += cluster.all_serve(uploaded)
    return fresh


def redis_up(cluster: Cluster, uploads: int) -> int:
    before = [cluster.health(index)["prompt_cache"]["redis"]["hits"] for index in range(3)]
    fresh = upload_and_ask(cluster, uploads)
    after = [cluster.health(index)["prompt_cache"]["redis"]["hits"] for index in range(3)]
    assert sum(after) > sum(before), "Redis was of use to nobody"
    return fresh


def redis_down(cluster: Cluster, uploads: int) -> int:
    cluster.redis.kill()
    fresh = upload_and_ask(cluster, uploads)
    cluster.redis.start()
    return fresh


def redis_lying(cluster: Cluster, uploads: int) -> int:
    """Wrong bytes under right keys, hints of old and foreign releases, replies of others."""
    liar = Redis(port=cluster.redis.port)

    def lie(prompt: Prompt, task_id: str) -> None:
        wrong = soft_prompt(10_000).data
        liar.set(KEY_PREFIX + prompt.digest, len(wrong).to_bytes(8, "little") + wrong)
        for hint in ({"task": task_id, "release": 1}, {"task": "nobody"}, ["junk"]):
            liar.publish(CHANNEL, json.dumps(hint))

    third = uploads // 3
    fresh = upload_and_ask(cluster, third, lie)
    for fault in (Fault.SWAP, Fault.CORRUPT):
        cluster.proxy.set(fault)
        fresh += upload_and_ask(cluster, third, lie)
        cluster.proxy.set(Fault.NONE)
        cluster.wait_for_redis("up")
    liar.close()
    return fresh


def no_hints(cluster: Cluster, uploads: int) -> int:
    """The ACL denies all channels; the cache itself works."""
    admin = Redis(port=cluster.redis.port)
    admin.execute_command("ACL", "SETUSER", "default", "resetchannels")
    admin.client_kill_filter(_type="pubsub")
    fresh = upload_and_ask(cluster, uploads)
    admin.execute_command("ACL", "SETUSER", "default", "allchannels")
    admin.close()
    return fresh


PHASES = (redis_up, redis_down, redis_lying, no_hints)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_no_answer_is_stale(cluster: Cluster, phase: Callable[[Cluster, int], int]) -> None:
    cluster.wait_for_redis("up")
    assert phase(cluster, 9) == 9


@pytest.mark.soak
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_no_answer_is_stale_300_uploads(cluster: Cluster, phase: Callable[[Cluster, int], int]) -> None:
    cluster.wait_for_redis("up")
    assert phase(cluster, 75) == 75


def test_moves_and_rollbacks_are_seen_everywhere(cluster: Cluster) -> None:
    cluster.wait_for_redis("up")
    versions = [cluster.upload("moves", soft_prompt(20_000 + number)) for number in range(3)]
    for version in versions:
        url = cluster.dice.choice(cluster.urls)
        moved = cluster.client.put(f"{url}/tasks/moves/aliases/live", json={"version": version["version"]})
        assert moved.status_code == 200
        assert cluster.all_serve(version)
    for url, version in zip(cluster.urls, (versions[1], versions[0], versions[2]), strict=True):
        assert cluster.client.post(f"{url}/tasks/moves/rollback").json()["version"] == version["version"]
        assert cluster.all_serve(version)
    assert cluster.client.delete(f"{cluster.urls[0]}/tasks/moves").status_code == 200
    for url in cluster.urls:
        asked = cluster.client.post(f"{url}/generate", json={"task_id": "moves@1", "inputs": "a"})
        assert asked.status_code == 404


def test_a_blob_that_rots_on_the_disk_is_mended_from_redis(cluster: Cluster) -> None:
    """A fresh replica, which has the prompt in no tier of its own, looks through the store at its start."""
    cluster.wait_for_redis("up")
    prompt = soft_prompt(30_000)
    uploaded = cluster.upload("rotten", prompt)
    assert cluster.all_serve(uploaded)
    path = cluster.store / "blobs" / f"{prompt.digest}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Server.running(*cluster.flags) as fresh:
        url = fresh.wait_until_ready()
        fresh.wait_for("(healed)")
        assert path.read_bytes() == prompt.data
        assert cluster.all_serve(uploaded, url)
        assert cluster.client.get(f"{url}/health").json()["store"] == "up"
    aside = [each for each in (cluster.store / "quarantine").iterdir() if prompt.digest in each.name]
    assert [each.read_bytes() for each in aside] == [bytes(data)]
