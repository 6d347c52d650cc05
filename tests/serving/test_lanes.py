import asyncio
import threading

from app.serving.lanes import LONG, Lanes
from tests.waiting import eventually


def test_short_texts_wait_for_no_long_one_and_the_shortest_goes_first() -> None:
    lanes, gate, done = Lanes(), threading.Event(), list[str]()

    async def everything() -> None:
        first = asyncio.ensure_future(lanes.run(gate.wait, 9 * LONG))
        long = [
            asyncio.ensure_future(lanes.run(lambda name=str(size): done.append(name), size * LONG))  # type: ignore[misc]
            for size in (5, 3, 4, 2)
        ]
        for _ in range(20):
            await lanes.run(lambda: None, LONG)
        long[1].cancel()
        assert done == []
        gate.set()
        await asyncio.gather(first, *long, return_exceptions=True)

    asyncio.run(everything())
    assert done == ["2", "4", "5"]


def test_whoever_leaves_while_it_works_lets_the_others_go_on() -> None:
    lanes, begun, gate = Lanes(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        gate.wait()

    async def everything() -> str:
        first = asyncio.ensure_future(lanes.run(work, 2 * LONG))
        second = asyncio.ensure_future(lanes.run(lambda: "done", 2 * LONG))
        await eventually(begun.is_set)
        first.cancel()
        gate.set()
        return await second

    assert asyncio.run(everything()) == "done"
