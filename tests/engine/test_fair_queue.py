"""No tenant starves another, and within a tenant no task another."""

from app.engine.fair_queue import FairQueue
from app.engine.sequence import Sequence
from app.request import Request


def sequence(name: str, tenant: str = "", task: str = "", length: int = 10) -> Sequence:
    return Sequence(Request(id=name, token_ids=(1,) * length, tenant=tenant, task=task))


def serve(queue: FairQueue, count: int) -> list[Sequence]:
    served = []
    for _ in range(count):
        head = queue.peek()
        assert head is not None
        queue.take(head)
        queue.charge(head.party, len(head.tokens))
        served.append(head)
    return served


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    queue = FairQueue()
    for i in range(100):
        queue.push(sequence(f"flood-{i}", tenant="loud"))
    serve(queue, 20)
    queue.push(sequence("quiet", tenant="quiet"))
    assert "quiet" in [each.request.id for each in serve(queue, 2)]


def test_tenants_share_by_tokens_not_by_requests() -> None:
    queue = FairQueue()
    for i in range(60):
        queue.push(sequence(f"long-{i}", tenant="long", length=30))
        queue.push(sequence(f"short-{i}", tenant="short", length=10))
    tokens = {"long": 0, "short": 0}
    for each in serve(queue, 60):
        tokens[each.request.tenant] += len(each.tokens)
    assert abs(tokens["long"] - tokens["short"]) <= 30


def test_tasks_of_a_tenant_share_too_and_keep_their_order() -> None:
    queue = FairQueue()
    for i in range(50):
        queue.push(sequence(f"a-{i}", task="a"))
    for i in range(3):
        queue.push(sequence(f"b-{i}", task="b"))
    served = [each.request.id for each in serve(queue, 8)]
    assert [name for name in served if name[0] == "b"] == ["b-0", "b-1", "b-2"]
    assert [name for name in served if name[0] == "a"] == [f"a-{i}" for i in range(5)]


def test_idling_saves_up_nothing() -> None:
    queue = FairQueue()
    for i in range(40):
        queue.push(sequence(f"busy-{i}", tenant="busy"))
    serve(queue, 20)
    for i in range(40):
        queue.push(sequence(f"late-{i}", tenant="late"))
    tenants = [each.request.tenant for each in serve(queue, 20)]
    assert tenants.count("busy") >= 9, "the newcomer doesn't collect for the time it was away"


def test_a_preempted_sequence_goes_first_in_its_task() -> None:
    queue = FairQueue()
    queue.push(sequence("old"))
    queue.push(sequence("preempted"), front=True)
    assert [each.request.id for each in serve(queue, 2)] == ["preempted", "old"]
    assert queue.peek() is None


def test_a_newcomer_does_not_collect_for_the_time_it_was_away() -> None:
    """Nobody ever waited beside A, so its long past counts for nothing when B comes."""
    queue = FairQueue()
    for i in range(200):
        queue.push(sequence(f"a-{i}", tenant="a"))
        serve(queue, 1)
    for i in range(50):
        queue.push(sequence(f"b-{i}", tenant="b"))
    queue.push(sequence("a-late", tenant="a"))
    assert "a-late" in [each.request.id for each in serve(queue, 3)]


def test_when_nobody_is_there_everybody_starts_anew() -> None:
    queue = FairQueue()
    for i in range(100):
        queue.push(sequence(str(i), tenant=f"t{i}", task=f"k{i}"))
        serve(queue, 1)
    queue.reset()
    assert not queue._tasks
    assert queue.peek() is None
