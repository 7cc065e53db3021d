"""For all tests: no progress bars, and one thread a process, since the tests run in parallel."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Nothing here may depend on a clock: a busy machine is no failure.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_collection_finish() -> None:
    """What is there after collection stays: a garbage collection, which some tests ask for often, need not visit it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
