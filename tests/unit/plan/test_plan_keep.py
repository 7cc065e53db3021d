"""How many layers keep their graphs."""

from __future__ import annotations

import pytest

from sophia_galore.config import load_config
from sophia_galore.plan.keep import kept_layers


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 0),
        (["engine.keep_layers=2"], 2),
        (["engine.keep_layers=99"], 7),
        (["engine.keep_layers=auto"], 0),
        (["gradient_checkpointing=false"], 7),
        (["gradient_checkpointing=true"], 0),
    ],
)
def test_how_many_layers_keep_their_graphs(words: list[str], expected: int) -> None:
    assert kept_layers(load_config(None, words), 7) == expected
