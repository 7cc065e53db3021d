"""SIGINT and SIGTERM: the first asks, the second acts, and afterwards everything is as it was."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from forked import run_forked
from sophia_galore.train.signals import stop_on_signal
from stopping import leave_sigterm

pytestmark = pytest.mark.signals

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


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is none on Windows")
@pytest.mark.parametrize(
    ("sent", "left"),
    [
        # SIGHUP asks, and never stops at once; what stops at once stays possible.
        ([signal.SIGHUP], None),
        ([signal.SIGHUP, signal.SIGHUP], None),
        ([signal.SIGTERM, signal.SIGHUP], signal.SIG_DFL),  # as a system ends a session
        ([signal.SIGHUP, signal.SIGTERM], signal.SIG_DFL),
    ],
)
def test_a_hangup_asks_and_never_stops_at_once(sent: list[signal.Signals], left: object) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with stop_on_signal() as stop:
            ours = signal.getsignal(signal.SIGTERM)
            for number in sent:
                os.kill(os.getpid(), number)
            assert stop.requested
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == (ours if left is None else left)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_system_without_hangups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has neither SIGHUP nor SIGPIPE."""
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_a_terminal_that_is_gone_does_not_break_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*given: object) -> int:
        raise OSError(5, "Input/output error")

    with stop_on_signal() as stop, monkeypatch.context() as patch:
        patch.setattr(os, "write", gone)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_who_cancels_the_tests_ends_them_and_stops_no_run(tmp_path: Path) -> None:
    """Where a test does not send itself the signal, no run in its process takes it for a request."""

    def asked_to_end(*, taken: bool) -> int:
        leave_sigterm(taken)
        with stop_on_signal() as request:
            os.kill(os.getpid(), signal.SIGTERM)
        return 3 if request.requested else 4

    assert run_forked(lambda: asked_to_end(taken=False), tmp_path / "log") == -signal.SIGTERM
    assert run_forked(lambda: asked_to_end(taken=True), tmp_path / "log") == 3
