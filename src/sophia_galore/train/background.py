"""Work that goes on in a thread beside the steps, one piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Carries out work in a thread. It must not touch what steps change."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, when the one before has ended.

        Args:
            work: What is done.

        Raises:
            Exception: That of the work before.
        """
        self.wait()
        self._work = self._thread.submit(work)

    def check(self) -> None:
        """Raise the error of work that has failed; do not wait for work that goes on."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the work has ended.

        Raises:
            Exception: That of the work; once.
        """
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def close(self) -> None:
        """Wait until the work has ended, whether it failed or not, and end the thread."""
        self._work = None
        self._thread.shutdown()
