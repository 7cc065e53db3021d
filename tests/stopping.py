"""Who asks this process to end means the tests, not the run that one of them trains.

A run takes SIGTERM as a request to save and stop. In a test it is trained in the test's own process, where that would
make a job that is cancelled look like a test that failed, and the tests would go on. So no code gets the signal here:
the process ends, as any other does. Tests that send it themselves are marked `signals`.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest

_signal = signal.signal
_taken = False


def leave_sigterm(taken: bool) -> None:
    """From now on SIGTERM ends this process, whatever handler is set for it.

    Args:
        taken: Whether handlers may be set after all.
    """
    global _taken
    _taken = taken
    if signal.signal is not _set:
        signal.signal = _set


def _set(number: int, handler: Any) -> Any:
    if number == signal.SIGTERM and not _taken:
        return signal.getsignal(number)
    return _signal(number, handler)


def may_take_it(item: pytest.Item) -> bool:
    """Whether a test sends itself signals."""
    return item.get_closest_marker("signals") is not None
