"""One world for all tests of the command line; each run has its own folder in it."""

from __future__ import annotations

import pytest

from unit.cli.tiny_run import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))
