"""Tiny training runs, each made once, when a check first asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sophia_galore.config import RunConfig, load_config
from sophia_galore.doctor.bits import Bits
from sophia_galore.doctor.killed import KILL
from sophia_galore.doctor.tiny_model import QUESTION, write_data, write_model
from sophia_galore.errors import RunError
from sophia_galore.train.callback import Callback
from sophia_galore.train.result import RunResult
from sophia_galore.train.run import train

NUM_STEPS = 4
SAVED_AFTER = 2
KILLED_AFTER = 3
"""The step after which the process is killed: one after a checkpoint, so that it is lost and has to be repeated."""

_EVERY = (
    f"training.max_steps={NUM_STEPS}",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.max_length=40",
    "training.learning_rate=0.001",
    f'training.sample_questions=["{QUESTION}"]',
    "training.sample_max_new_tokens=8",
    "data.eval_fraction=0.25",
    "optimizer.galore.rank=8",
    "optimizer.galore.update_proj_gap=2",
    f"checkpoint.save_every_steps={SAVED_AFTER}",
)
# What is predicted and measured takes as long as a tiny run itself, and changes no number.
_QUICK = ("memory.predict=false", "memory.track_steps=0", "training.probe_step=false")
_MEASURED = (f"memory.track_steps={NUM_STEPS}",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": _MEASURED,
    "again": _QUICK,
    "killed": _QUICK,
    "bf16": (*_QUICK, "model.store=bf16"),
    "int8": (*_QUICK, "quantization.enabled=true", "quantization.load_in_8bit=true", "optimizer.state_bits=8"),
    "host": (*_QUICK, "memory.placement=host"),
    "disk": (*_QUICK, "memory.placement=disk"),
}
_MOST_S = 300.0


class FailedBefore(Exception):
    """A run that this check needs failed in an earlier one, which says why."""


@dataclass(frozen=True)
class Trial:
    """A run that finished.

    Args:
        folder: Its folder.
        result: Its result.
        bits: What it left behind.
    """

    folder: Path
    result: RunResult
    bits: Bits

    @property
    def first_loss(self) -> float:
        """The evaluation loss before the first step."""
        return self.result.evaluations[0].loss

    @property
    def last_loss(self) -> float:
        """The evaluation loss after the last step."""
        return self.result.evaluations[-1].loss


class Trials:
    """The tiny runs of an examination.

    Args:
        folder: Where they go.
        device: The device that they train on.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self.device = device
        self.made: dict[str, Trial] = {}
        """The runs that finished, by name."""
        self._failed: set[str] = set()

    @cached_property
    def model(self) -> Path:
        """The folder of the model that is trained."""
        return write_model(self._folder / "model")

    @cached_property
    def data(self) -> Path:
        """The file of its training data."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return write_data(self._folder / "data.json")

    def run(self, name: str) -> Trial:
        """Return a run of `VARIANTS`.

        Raises:
            FailedBefore: It failed when another check asked for it.
        """
        if name in self._failed:
            raise FailedBefore(f'It needs the run "{name}", which failed, as is said above.')
        if name not in self.made:
            self._failed.add(name)
            self.made[name] = self.train(name, *VARIANTS[name])
            self._failed.remove(name)
        return self.made[name]

    def train(self, name: str, *words: str, resume: bool = False) -> Trial:
        """Train in this process.

        Args:
            name: Name of the run's folder.
            words: Settings, as on the command line.
            resume: Whether to go on from the newest checkpoint in that folder.
        """
        result = train(self._config(name, *words), Callback(), resume=resume)
        if not result.finished:
            raise KeyboardInterrupt  # Ctrl-C stopped the run in order, and means the whole examination
        return Trial(result.folder, result, Bits.of(result.folder))

    def kill_one(self) -> None:
        """Train in a process of its own, which is killed after step `KILLED_AFTER`.

        Raises:
            RunError: It ended in another way.
        """
        words = [str(KILLED_AFTER), str(torch.get_num_threads()), *self.words("killed", *VARIANTS["killed"])]
        done = subprocess.run(
            [sys.executable, "-m", "sophia_galore.doctor.killed", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_MOST_S,
            check=False,
            # What is imported here is imported there, wherever it comes from.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        if done.returncode not in (-KILL, KILL):  # the second is how Windows says it
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
            raise RunError(
                f"The process that was to be killed after step {KILLED_AFTER} ended by itself with exit code "
                f"{done.returncode}: {last}.",
                "Start a short run with `sophia-galore train` and see what it says.",
            )

    @cached_property
    def resumed(self) -> Trial:
        """The run that was killed, and resumed in this process."""
        if "killed" not in self.made:
            if not (self._folder / "killed").exists():
                self.kill_one()
            self.made["killed"] = self.train("killed", *VARIANTS["killed"], resume=True)
        return self.made["killed"]

    def words(self, name: str, *words: str) -> list[str]:
        """Return the settings of a run into a folder."""
        places = {"model.name": self.model, "data.train": self.data, "training.output_dir": self._folder / name}
        # Values are read as YAML, in which a path may mean something else without quotes.
        named = [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
        return [*named, f"training.device={self.device}", *_EVERY, *words]

    def _config(self, name: str, *words: str) -> RunConfig:
        return load_config(None, self.words(name, *words))
