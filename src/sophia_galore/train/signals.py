"""Stop signals: the first stops the run after the current step, the second stops it at once.

SIGHUP, sent when the terminal closes, counts only as a first signal: a closing terminal may send several, and a system
that ends a session sends one right after SIGTERM. Under `nohup`, SIGHUP stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = "\nStopping: the step is finished and saved first."
_ONCE_MORE = " Once more stops at once, without saving."


class StopRequest:
    """Whether the user asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False


def hangup_signals() -> tuple[signal.Signals, ...]:
    """Return SIGHUP if the system has it and it is not ignored."""
    # Windows has none; None as a handler was set by code that is not Python's.
    number = getattr(signal, "SIGHUP", None)
    return (number,) if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None) else ()


@contextmanager
def stop_on_signal(*, once_more_ends: bool = True, says: bool = True) -> Iterator[StopRequest]:
    """Set a request at the first SIGINT, SIGTERM or SIGHUP; a second SIGINT or SIGTERM acts as usual.

    Args:
        once_more_ends: Whether it does. A launcher of several processes passes on the signal that the terminal has
            sent to each of them already.
        says: Whether the user is told that the run is stopping.

    Yields:
        The request; outside the main thread, where Python allows no handlers, it is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    asking, hangups = (signal.SIGINT, signal.SIGTERM), hangup_signals()
    before = {number: signal.getsignal(number) for number in (*asking, *hangups)}

    def handle(number: int, _frame: FrameType | None) -> None:
        is_repeated, request.requested = request.requested, True
        for each in hangups:
            signal.signal(each, signal.SIG_IGN)
        if number in hangups or (is_repeated and not once_more_ends):
            return
        if once_more_ends:
            for each in asking:
                signal.signal(each, signal.SIG_DFL)
        # Not by print: a handler may run in the middle of one, which can't be entered twice. The terminal may be gone.
        with contextlib.suppress(OSError):
            if says:
                os.write(2, f"{_STOPPING}{_ONCE_MORE if once_more_ends else ''}\n".encode())

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
