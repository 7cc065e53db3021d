"""A world for each file of tests of the command line; each run has its own folder in it.

A name of a folder is taken once: a second run into it is refused. So files don't share a world, and the order in which
they run doesn't matter.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import write_tiny_model
from unit.cli.tiny_run import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def talkers_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("talkers"))


@pytest.fixture(scope="session")
def talker(talkers_world: World) -> Path:
    """A model that says different things to different questions; the world's own repeats itself."""
    return write_tiny_model(talkers_world.folder / "talker", tied=False, seed=1)


@pytest.fixture(scope="session")
def trained_talker(talkers_world: World, talker: Path) -> Path:
    """A finished run from it, with checkpoints of steps 2 and 4, whose answers are others than before."""
    words = [f"model.name={talker}", "training.max_steps=5", "checkpoint.save_every_steps=2"]
    words += ["training.learning_rate=6e-4", "training.lr_scheduler_type=constant"]
    ended = talkers_world.train("talker-run", "--optimizer", "adamw", *words)
    assert ended.code == 0, ended.err
    return talkers_world.folder / "talker-run"
