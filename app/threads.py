"""Threads that are there before they are needed: a limit of threads is met at the start, not by a request."""

import threading
from concurrent.futures import ThreadPoolExecutor


class Workers(ThreadPoolExecutor):
    """A pool of `count` threads, all of which run when this returns; none is started later."""

    def __init__(self, count: int, name: str) -> None:
        """Raises RuntimeError where the system gives fewer threads; then none is left behind."""
        super().__init__(count, thread_name_prefix=name)
        together = threading.Barrier(count + 1)  # a thread that waits is not idle, so the next one is started
        try:
            for _ in range(count):
                self.submit(together.wait)
            together.wait()
        except BaseException:
            together.abort()
            self.shutdown(cancel_futures=True)
            raise
