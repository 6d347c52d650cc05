"""How work on the device is recorded, to be done again by one call."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

Work = Callable[[], None]  # reads and writes tensors that stay where they are


class Capture(Protocol):
    """Records work."""

    def record(self, work: Work) -> Work:
        """Do the work, to find out whether it can be recorded, then return what does it again.

        Raises whatever keeps it from being recorded.
        """
        ...


class Repetition:
    """Records nothing: work is done again by calling it. For devices without graphs."""

    def record(self, work: Work) -> Work:
        work()
        return work


class CudaCapture:
    """Records CUDA graphs, one after the other on one stream and in one memory pool.

    What a graph computes is overwritten by the next graph that is replayed, unless it was copied to memory of
    the caller's own within the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        self._warm_up(work)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are recorded; another one may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def _warm_up(self, work: Work) -> None:
        """Do the work twice: what is made once (compiled kernels, workspaces), then what is always done.

        Work that waits for the device raises here, not within a capture, which would leave the memory pool
        in disorder.
        """
        ours = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(ours)
        with torch.cuda.stream(self._stream):
            work()
            with _no_waiting():
                work()
        ours.wait_stream(self._stream)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Let every operation raise that waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
