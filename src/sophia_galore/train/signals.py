"""SIGINT and SIGTERM: the first asks the run to stop after this step, the second stops it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the user asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Inside the context the first SIGINT or SIGTERM sets the request, and the second acts as usual.

    Yields:
        The request; outside the main thread, where Python allows no handlers, nobody will set it.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in handled}

    def handle(number: int, _frame: FrameType | None) -> None:
        request.requested = True
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        # Not by print: a handler may run in the middle of one, which can't be entered twice.
        os.write(2, b"\nStopping: the step is finished and saved first. Once more stops at once, without saving.\n")

    for number in handled:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
