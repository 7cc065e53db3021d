"""For all tests: no progress bars, one thread a process, since they run in parallel, and pictures only if looked at.

A run ends with two pictures, which take as long as its steps when these are tiny. They are drawn only in the tests of
reports and in those marked `drawn`; in the others an empty picture is written.
"""

from __future__ import annotations

import gc
import os
from base64 import b64decode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

from in_part import gone, leave_cases_to_thorough
from pairwise import leave_to_thorough
from stopping import leave_sigterm, may_take_it

# A result may depend neither on a clock nor on chance: the same examples each time. To look for others:
# pytest --hypothesis-profile=search
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile("same")

_EMPTY = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg==")
_drawn = False
_module: Path | None = None


@pytest.hookimpl(tryfirst=True)  # before they are deselected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not any("::" in word for word in config.args) and (names := gone(items)):
        raise pytest.UsageError(f"tests/in_part.py names tests that are gone: {', '.join(names)}")
    leave_to_thorough(items)
    leave_cases_to_thorough(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _drawn, _module
    if item.path != _module:
        _module = item.path
        # What was imported and cached so far stays: a garbage collection, which some tests ask for often, can skip it.
        gc.collect()
        gc.freeze()
    leave_sigterm(may_take_it(item))
    _drawn = item.path.parent.name == "report" or item.get_closest_marker("drawn") is not None


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> None:
    """A run's figures are empty where no test looks, and so are all PNG files."""
    from matplotlib.figure import Figure

    from sophia_galore.report import draw_loss, draw_memory

    for module, name in ((draw_loss, "draw_loss"), (draw_memory, "draw_memory")):
        setattr(module, name, partial(_figure, getattr(module, name)))
    draw = Figure.savefig

    def savefig(figure: Figure, file: Any, **how: Any) -> None:
        if _drawn or how.get("format") != "png":
            draw(figure, file, **how)
        else:
            Path(file).write_bytes(_EMPTY)

    Figure.savefig = savefig


def _figure(draw: Callable[..., Any], *records: Any) -> Any:
    from matplotlib.figure import Figure

    return draw(*records) if _drawn else Figure()


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
