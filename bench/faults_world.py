"""What all kinds of faults share: a tiny model and its data, the settings of runs, and what undisturbed runs leave."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults_child import command, start
from measured import weights_sha256
from sophia_galore.doctor.tiny_model import chat_tokenizer, write_data
from sophia_galore.errors import UserError
from sophia_galore.train.checkpoint import checkpoints, find_checkpoint
from sophia_galore.train.folder import streaming_folder

NUM_STEPS, SAVED_EVERY = 6, 2
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_COMMON = (
    "data.eval_fraction=0.2",
    f"training.max_steps={NUM_STEPS}",
    "training.batch_size=1",
    "training.gradient_accumulation_steps=2",
    "training.max_length=40",
    "training.learning_rate=0.01",
    "training.device=cpu",
    "training.probe_step=false",
    "training.sample_questions=[]",
    "optimizer.galore.rank=8",
    "optimizer.galore.update_proj_gap=2",
    "optimizer.apollo.rank=8",
    "optimizer.apollo.update_proj_gap=2",
    "optimizer.sophia.curvature_every=2",
    f"checkpoint.save_every_steps={SAVED_EVERY}",
    "checkpoint.keep_last=2",
    "memory.predict=false",
    "memory.track_steps=0",
)
PLACEMENTS = ("device", "host", "disk")
STORES: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("model.store=bf16",),
    "int8": ("quantization.enabled=true", "quantization.block_size=32"),
    "int8, folded late": ("quantization.enabled=true", "quantization.block_size=32", "quantization.fold=refresh"),
}
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "galore": ("optimizer.type=galore",),
    "galore, svd": ("optimizer.type=galore", "optimizer.galore.subspace=svd", "optimizer.state_bits=8"),
    "adamw": ("optimizer.type=adamw",),
    "sophia": ("optimizer.type=sophia",),
    "apollo": ("optimizer.type=apollo",),
    "scale": ("optimizer.type=scale",),
}
# Updates can be kept apart only where there is a subspace.
_FOLDED = ("galore", "galore, svd")


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Args:
        placement: Where layers live, of `PLACEMENTS`.
        store: One of `STORES`.
        optimizer: One of `OPTIMIZERS`.
        num_processes: Processes of the run.
    """

    placement: str
    store: str
    optimizer: str
    num_processes: int = 1

    def __str__(self) -> str:
        """Its name in results."""
        return f"{self.placement} / {self.store} / {self.optimizer} / {self.num_processes}"

    @property
    def words(self) -> list[str]:
        """Overrides for the command line."""
        return [f"memory.placement={self.placement}", *STORES[self.store], *OPTIMIZERS[self.optimizer]]


def settings(num_processes: tuple[int, ...] = (1, 2)) -> list[Setting]:
    """Return all settings, in an order in which neighbours differ in everything."""
    every = [
        Setting(placement, store, optimizer, count)
        for count in num_processes
        for optimizer in OPTIMIZERS
        for store in STORES
        for placement in PLACEMENTS
        if store != "int8, folded late" or optimizer in _FOLDED
    ]
    random.Random(0).shuffle(every)
    return every


FEW = (
    Setting("device", "fp32", "galore"),
    Setting("disk", "bf16", "adamw"),
    Setting("host", "int8", "sophia"),
    Setting("disk", "int8, folded late", "galore"),
)
"""Each placement and store: for kinds of faults that do not depend on the optimizer."""


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run left.

    Args:
        folder: Its folder.
        sha256: Digest of its final weights.
        losses: Step, and loss or eval loss, of each record.
        seconds: How long it took.
    """

    folder: Path
    sha256: str
    losses: list[tuple[int, float]]
    seconds: float


@dataclass
class Found:
    """What came of one case.

    Args:
        case: What was done, so that it can be done again.
        counts: What is added up over all cases.
        faults: What should not have been, in words; empty if all was well.
    """

    case: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0) + number


class World:
    """A folder with a model, data and runs.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.data, self.config = folder / "model", folder / "data.json", folder / "config.yaml"
        write_model(self.model)
        write_data(self.data, num_records=12, most_words=(3, 4))
        self.config.write_text("{}\n", encoding="utf-8")
        self._wholes: dict[Setting, Whole] = {}
        self.kept: dict[Any, Any] = {}
        """What a kind keeps between its cases."""
        self._warm_up()

    def _warm_up(self) -> None:
        """Train in this process once: what is imported and cached on the way, its copies have."""
        with self.place() as place, contextlib.redirect_stdout(io.StringIO()) as out:
            if command(self.words(place / "run", "training.max_steps=1"))() != 0:
                raise RuntimeError(f"a tiny run fails: {out.getvalue()[-400:]}")
        # Copies of a process with threads may hang.
        if (running := threading.active_count()) > 1:
            raise RuntimeError(f"{running} threads are left of a tiny run")
        gc.collect()
        gc.freeze()

    def words(self, output: Path, *more: str, resume: bool = False) -> list[str]:
        """Return the words of a `train` command.

        Args:
            output: The run's folder.
            more: Further overrides.
            resume: Whether the run goes on from its newest checkpoint.
        """
        common = [f"model.name={self.model}", f"data.train={self.data}", f"training.output_dir={output}", *_COMMON]
        return ["train", "--config", str(self.config), *(["--resume"] if resume else []), *common, *more]

    def undisturbed(self, setting: Setting) -> Whole:
        """Return what an undisturbed run of a setting leaves; it is carried out once."""
        if setting not in self._wholes:
            output = self.folder / str(setting).replace(" ", "").replace("/", "-") / "run"
            log = output.with_name("log")
            shutil.rmtree(output.parent, ignore_errors=True)
            output.parent.mkdir()
            began = time.monotonic()
            codes = [
                child.wait() for child in start(command(self.words(output, *setting.words)), log, setting.num_processes)
            ]
            if any(codes):
                raise RuntimeError(f"an undisturbed run of {setting} fails: {last_words(log)}")
            self._wholes[setting] = Whole(output, weights_sha256(output), losses_of(output), time.monotonic() - began)
        return self._wholes[setting]

    @contextmanager
    def place(self) -> Iterator[Path]:
        """Lend an empty folder for one case; it is removed afterwards."""
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, setting: Setting, output: Path, log: Path, found: Found, *more: str) -> None:
        """Take a run that was disturbed to its end, and compare it with the undisturbed one.

        Args:
            setting: The setting of the run.
            output: The run's folder.
            log: Takes what is printed.
            found: Takes the faults.
            more: Further overrides.
        """
        resumes = bool(checkpoints(output)) if output.is_dir() else False
        words = self.words(output, *setting.words, *more, resume=resumes)
        codes = [child.wait() for child in start(command(words), log, setting.num_processes)]
        if any(codes):
            found.faults.append(f"can't go on: {codes}: {last_words(log)}")
            return
        self.compare(setting, output, found)

    def compare(self, setting: Setting, output: Path, found: Found) -> None:
        """Compare a finished run with the undisturbed one."""
        whole = self.undisturbed(setting)
        if weights_sha256(output) != whole.sha256:
            number = differing_bits(output, whole.folder)
            found.count("differing bits", number)
            found.faults.append(f"the final weights differ in {number} bits")
        if losses_of(output) != whole.losses:
            found.faults.append("metrics.jsonl lacks records, or has other losses")
        if left := left_behind(output):
            found.faults.append(f"left behind: {', '.join(left)}")


def write_model(folder: Path) -> None:
    """Write a model of two small layers with random weights, and a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = chat_tokenizer(280)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_SIZES, **ids, vocab_size=len(words))).save_pretrained(folder)
    words.save_pretrained(folder)


def losses_of(run: Path) -> list[tuple[int, float]]:
    """Return step, and loss or eval loss, of each record of a run that has one."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line[key]) for line in lines for key in ("loss", "eval_loss") if key in line]


def torn_checkpoints(run: Path) -> list[str]:
    """Return what is wrong with each checkpoint of a run that is not what was written."""
    wrong = []
    for saved in checkpoints(run):
        try:
            find_checkpoint(run, saved)
        except UserError as error:
            wrong.append(error.cause)
    return wrong


def differing_bits(one: Path, other: Path) -> int:
    """Count the bits in which the weights of two folders differ."""
    import torch
    from safetensors.torch import load_file

    total = 0
    for path in sorted(one.glob("model*.safetensors")):
        ours, theirs = load_file(path), load_file(other / path.name)
        for name, tensor in ours.items():
            # A view of another dtype needs a dimension.
            bytes_of = [each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, theirs[name])]
            total += sum(int(value).bit_count() for value in (bytes_of[0] ^ bytes_of[1]).tolist())
    return total


def left_behind(output: Path) -> list[str]:
    """Return the names of temporary files and folders that a finished run left."""
    left = [path.name for path in output.rglob(".*")]
    left += [folder.name for rank in range(2) if (folder := streaming_folder(output, rank)).exists()]
    return left


def said_in(log: Path) -> str:
    """Return what was printed; empty if nothing was yet."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def last_words(log: Path, most: int = 400) -> str:
    """Return the end of what was printed."""
    return " ".join(said_in(log).split())[-most:]


def traceback_in(log: Path) -> bool:
    """Return whether somebody who ran this would see a traceback, or that something should not have happened."""
    said = said_in(log)
    return "Traceback (most recent call last)" in said or "This should not happen" in said
