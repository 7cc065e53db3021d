"""Read datasets of the Hugging Face hub, or their copies in the local cache."""

from __future__ import annotations

import os
import re
import socket
import threading
import urllib.request
from pathlib import PurePath
from urllib.parse import urlsplit

from sophia_galore.data.record import Record
from sophia_galore.errors import DataError, short

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.\[\]%:+-]+)?")
FILE_ENDINGS = {".json", ".jsonl", ".csv", ".parquet", ".txt", ".tsv", ".xlsx", ".zip", ".gz", ".zst", ".arrow", ".md"}
REACH_TIMEOUT_S = 3.0


def looks_like_hub_id(name: str) -> bool:
    """Return whether a name that is not a local file could be a hub dataset.

    Args:
        name: What the user wrote.

    Returns:
        True for ``owner/name`` and ``owner/name:split``, unless it ends like a data file.
    """
    return HUB_ID.fullmatch(name) is not None and PurePath(name).suffix.lower() not in FILE_ENDINGS


def read_hub(dataset_id: str) -> list[Record]:
    """Load a dataset of the hub.

    The connection is tested first, because the hub's client would retry for minutes. With ``HF_HUB_OFFLINE=1`` only
    the local cache is used.

    Args:
        dataset_id: ``owner/name`` (its split ``train``) or ``owner/name:split``.

    Returns:
        The records; ``where`` counts them from 1.

    Raises:
        DataError: The hub can't be reached, or does not have the dataset or the split.
    """
    name, _, split = dataset_id.partition(":")
    split = split or "train"
    if not _offline() and not _reachable(endpoint := os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        raise DataError(
            f"{dataset_id} is no file or folder here, and the hub at {endpoint} can't be reached to look for it there.",
            "Check the path or the network; HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 uses only the local cache.",
        )
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
        records = [Record(dict(row), f"{dataset_id}, record {number}") for number, row in enumerate(rows, start=1)]
    except Exception as error:  # the client raises anything from KeyError to its own ConnectionErrors
        raise DataError(
            f"{dataset_id} is no file or folder here, and the dataset {name!r} (split {split!r}) can't be loaded: "
            f"{short(error)}",
            "Check the name on the hub; `owner/name:split` chooses a split.",
        ) from error
    if not records:
        raise DataError(f"{dataset_id} is empty: there is no record in it.", "Choose another split.")
    return records


def _offline() -> bool:
    yes = {"1", "on", "yes", "true"}
    return any(os.environ.get(name, "").lower() in yes for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def _reachable(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=REACH_TIMEOUT_S).close()
        except OSError:
            return
        answered.set()

    # In a separate thread: the socket's timeout does not cover a name server that never answers.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_TIMEOUT_S)
    return answered.is_set()
