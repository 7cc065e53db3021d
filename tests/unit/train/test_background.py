"""Work beside the steps: one piece at a time, and no error is lost."""

from __future__ import annotations

import threading

import pytest

from sophia_galore.train.background import Background


class Work:
    """Ends when it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.began, self.may_end, self.ended = threading.Event(), threading.Event(), False
        self._error = error

    def __call__(self) -> None:
        self.began.set()
        assert self.may_end.wait(60)
        if self._error:
            raise self._error
        self.ended = True


def test_it_goes_on_beside_its_caller_and_one_piece_waits_for_the_other() -> None:
    background, one, other = Background(), Work(), Work()
    background.start(one)
    assert one.began.wait(60) and not one.ended
    background.check()  # does not wait
    threading.Timer(0.05, one.may_end.set).start()
    background.start(other)
    assert one.ended and not other.ended
    other.may_end.set()
    background.wait()
    assert other.ended
    background.wait()  # nothing to wait for
    background.close()


@pytest.mark.parametrize("by", ["check", "wait", "start"])
def test_an_error_is_raised_once(by: str) -> None:
    background, failing = Background(), Work(ValueError("full"))
    background.start(failing)
    failing.may_end.set()
    background._thread.submit(lambda: None).result(60)  # what began after it has ended
    with pytest.raises(ValueError, match="full"):
        background.start(lambda: None) if by == "start" else getattr(background, by)()
    background.check()
    background.wait()
    background.close()


def test_closing_waits_and_is_silent() -> None:
    background, failing, last = Background(), Work(ValueError("full")), Work()
    background.start(failing)
    threading.Timer(0.05, failing.may_end.set).start()
    background.close()
    assert failing.may_end.is_set()
    background = Background()
    background.start(last)
    threading.Timer(0.05, last.may_end.set).start()
    background.close()
    assert last.ended
