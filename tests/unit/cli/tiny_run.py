"""Tiny runs through the command line, in this process."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.cli.main import main
from tiny import write_tiny_data, write_tiny_model

# 22 records, 4 held out: 18 examples in steps of 2 x 2: 5 steps an epoch, the last of two examples.
SETTINGS = """
model: {{name: "{model}"}}
data: {{train: "{data}", eval_fraction: 0.2}}
training:
  output_dir: "{output}"
  epochs: 2
  max_length: 64
  batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 0.01
optimizer: {{galore: {{rank: 8, update_proj_gap: 3}}}}
"""

# The forecast of memory takes about as long as a tiny run; the probe step and the tracking of tensors half of that.
UNPREDICTED = ("memory.predict=false",)
UNWATCHED = ("training.probe_step=false", "memory.track_steps=0")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """A folder with a model, data and a configuration.

    Attributes:
        folder: The folder.
        quick: Whether runs leave out the probe step and the tracking of memory, unless they are asked for.
    """

    folder: Path
    quick: bool = True

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.folder / "model"

    @property
    def data(self) -> Path:
        """The data's file."""
        return self.folder / "data.json"

    @property
    def config(self) -> Path:
        """The configuration's file."""
        return self.folder / "config.yaml"

    def train(self, output: str, *words: str) -> Ended:
        """`train` into a folder of this world, without a forecast of its memory unless the words ask for it."""
        left_out = UNPREDICTED + (UNWATCHED if self.quick else ())
        asked = (f"training.output_dir={self.folder / output}", *left_out, *words)
        return command("train", "--config", str(self.config), *asked)


def make_world(folder: Path) -> World:
    """Write model, data and configuration."""
    world = World(folder)
    write_tiny_model(world.model)
    write_tiny_data(world.data)
    world.config.write_text(SETTINGS.format(model=world.model, data=world.data, output=folder / "run"))
    return world


def command(*words: str) -> Ended:
    """`sophia-galore WORDS`, without a new process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(words))
    return Ended(code, out.getvalue(), err.getvalue())


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
