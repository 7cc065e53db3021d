"""Standard output and error that survive a closed pipe or terminal.

Training does not need a reader: a command goes on and its output is discarded. Only a command whose output is its
purpose, such as `generate`, ends when nobody reads it any more.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# Errors that mean that nobody reads the stream any more.
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESHUTDOWN, errno.ECONNRESET, errno.EINVAL}


class ReaderGone(Exception):
    """Nobody reads standard output any more, and the command needs a reader."""


class Display:
    """A text stream that does not fail if nobody reads it any more.

    Args:
        stream: The stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.needs_reader = False
        self.failure: OSError | None = None
        self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; without a reader it is discarded."""
        with self._surviving():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        with self._surviving():
            self._stream.flush()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # closed by somebody
            self._is_gone = True
        except OSError as error:
            if error.errno in _GONE:
                self._is_gone = True
                self.silence()
            elif self.needs_reader:
                raise
            else:
                self.failure = error  # such as a full disk; there may be room for the next line
        if self._is_gone and self.needs_reader:
            raise ReaderGone

    def silence(self) -> None:
        """Discard all further output, including buffers and output of other code."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def displays() -> Iterator[Display]:
    """Replace standard output and error by displays inside a context; yield that of standard output."""
    before = sys.stdout, sys.stderr
    out, err = (Display(stream) for stream in before)
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that can't show a character shows "?", instead of ending the run.
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        for display in (out, err):
            display.needs_reader = False
            display.flush()
            if display.failure is not None:
                display.silence()  # else Python complains about what is left in a buffer when it ends


def need_reader() -> None:
    """End this command when nobody reads its output any more."""
    if isinstance(sys.stdout, Display):
        sys.stdout.needs_reader = True


def open_standard_streams() -> None:
    """Open file descriptors 0, 1 and 2 if they are closed: else the next file would get one, and printed text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end of the process
