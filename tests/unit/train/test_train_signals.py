"""SIGINT and SIGTERM: the first asks, the second acts, and afterwards everything is as it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sophia_galore.train.signals import stop_on_signal

HANDLED = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", HANDLED)
def test_the_first_signal_asks_and_the_second_acts(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in HANDLED]
    with stop_on_signal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        said = capfd.readouterr().err
        assert said.count("Stopping") == 1 and "saved" in said and "Once more" in said
        # The system's own action: the next one, of either kind, ends the process.
        assert [signal.getsignal(each) for each in HANDLED] == [signal.SIG_DFL, signal.SIG_DFL]
    assert [signal.getsignal(each) for each in HANDLED] == before


def test_without_a_signal_nothing_is_asked() -> None:
    before = [signal.getsignal(each) for each in HANDLED]
    with stop_on_signal() as stop:
        assert [signal.getsignal(each) for each in HANDLED] != before
    assert not stop.requested
    assert [signal.getsignal(each) for each in HANDLED] == before


def test_handlers_come_back_after_an_exception() -> None:
    before = [signal.getsignal(each) for each in HANDLED]
    with pytest.raises(ValueError, match="x"), stop_on_signal():
        raise ValueError("x")
    assert [signal.getsignal(each) for each in HANDLED] == before


def test_each_run_has_its_own_request() -> None:
    with stop_on_signal() as first:
        os.kill(os.getpid(), signal.SIGTERM)
    with stop_on_signal() as second:
        assert first.requested and not second.requested


def test_outside_the_main_thread_a_run_goes_on_without_handlers() -> None:
    """Python lets only the main thread set handlers; a notebook or a server may train in another one."""
    seen: list[object] = []

    def train() -> None:
        try:
            with stop_on_signal() as stop:
                seen.append(stop.requested)
        except Exception as error:
            seen.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [False]
