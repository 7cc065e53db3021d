"""Test once per process, within seconds, whether a hub can be reached.

The hubs' libraries retry for minutes if there is no answer. So one small request is sent first, with the same HTTP
client that the library uses (same proxy, same certificates) and a timeout on the total time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

from sophia_galore.errors import short

PROBE_TIMEOUT_S = 4.0
"""Total time for name resolution, connection, TLS and the first answer."""

_STEP_TIMEOUT_S = 3.0


class Unreachable(Exception):
    """A source gave no usable answer; the next source may be tried.

    Args:
        reason: The reason, as part of a sentence.
        remedy: How to make this source usable, as a sentence; may be empty.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def probe(ask: Callable[[float], int], timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
    """Send one request and wait for its answer, at most `timeout_s`.

    The request runs in a daemon thread: if a name server does not answer, the C library blocks and no socket timeout
    applies.

    Args:
        ask: Sends the request with the given timeout in seconds; returns the HTTP status.
        timeout_s: Maximum total time in seconds.

    Returns:
        None if the hub answered, else the reason why it counts as unreachable.
    """
    outcome: list[str | None] = []

    def run() -> None:
        try:
            status = ask(min(_STEP_TIMEOUT_S, timeout_s))
        except Exception as error:
            outcome.append(short(error))
        else:
            # 407 comes from a proxy, 5xx from a gateway: the hub itself was not reached.
            outcome.append(f"it answered HTTP {status}" if status == 407 or status >= 500 else None)

    thread = threading.Thread(target=run, name="hub-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return outcome[0] if outcome else f"no answer within {timeout_s:g} s"


@cache
def probe_hugging_face(endpoint: str) -> str | None:
    """Probe a Hugging Face endpoint; the answer is remembered for the rest of the process."""
    from huggingface_hub import get_session

    return probe(lambda timeout_s: int(get_session().head(endpoint + "/", timeout=timeout_s).status_code))


@cache
def probe_modelscope(endpoint: str) -> str | None:
    """Probe a ModelScope endpoint; the answer is remembered for the rest of the process."""
    import requests

    def ask(timeout_s: float) -> int:
        return requests.head(endpoint + "/", timeout=timeout_s, allow_redirects=False).status_code

    return probe(ask)
