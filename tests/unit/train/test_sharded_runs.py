"""A whole run whose files are in several parts: saved, killed, resumed, exported, pushed, on a disk that fills up."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import stat
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fake_hub import MODEL as HUB_ID
from fake_hub import FakeHub, taking_uploads
from forked import run_forked
from resume.crash_run import kill_at
from sophia_galore.config import load_config
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.records.files import INT8_INDEX, MODEL, MODEL_INDEX, OPTIMIZER_STATE
from sophia_galore.train import checkpoint as saving
from sophia_galore.train import convert as converting
from sophia_galore.train import output as run_output
from sophia_galore.train import to_gguf
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import checkpoints, find_checkpoint
from sophia_galore.train.run import train
from sophia_galore.train.trained import find_weights
from sophia_galore.weights.folder import weight_files
from sophia_galore.weights.manifest import check_model_folder
from sophia_galore.weights.safetensors_layout import TensorWriter
from unit.cli.tiny_run import UNPREDICTED, UNWATCHED, World, command, make_world, sha256

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# A tenth of the tiny model in fp32; its embedding is larger, so that it has a file of its own.
SHARD_BYTES = 60_000
KINDS: dict[str, list[str]] = {
    "galore": [],
    "adamw, bf16": ["optimizer.type=adamw", "model.store=bf16"],
    "int8, folded late": [
        "quantization.load_in_8bit=true",
        "quantization.fold=refresh",
        "optimizer.galore.update_proj_gap=4",
    ],
}
COMMON = [
    "training.max_steps=5",
    "training.lr_scheduler_type=constant",
    "checkpoint.save_every_steps=2",
    *UNPREDICTED,
    *UNWATCHED,
]
EVERY = pytest.mark.parametrize("kind", KINDS)
MOST = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.thorough] if "adamw" in kind else []) for kind in KINDS]
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def shard(patch: pytest.MonkeyPatch, shard_bytes: int = SHARD_BYTES) -> None:
    """Let all that writes weights or states begin a new file after so many bytes."""
    for module, name in (
        (run_output, "write_model"),
        (run_output, "save_checkpoint"),
        (converting, "convert_model"),
        (converting, "save_checkpoint"),
        (to_gguf, "convert_model"),
    ):
        patch.setattr(module, name, partial(getattr(module, name), shard_bytes=shard_bytes))


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    shard(monkeypatch)


def carry_out(world: World, folder: Path, *words: str, resume: bool = False) -> None:
    config = load_config(world.config, [*COMMON, f"training.output_dir={folder}", *words])
    assert train(config, Callback(), resume=resume).finished


@pytest.fixture(scope="module")
def runs(world: World) -> Iterator[Path]:
    """Uninterrupted runs of each kind: `KIND` in several files, `KIND, whole` in one."""
    for kind, words in KINDS.items():
        carry_out(world, world.folder / f"{kind}, whole", *words)
    with pytest.MonkeyPatch.context() as patch:
        shard(patch)
        for kind, words in KINDS.items():
            carry_out(world, world.folder / kind, *words)
    yield world.folder


def digests(folder: Path, pattern: str = "*.safetensors*") -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob(pattern))}


def tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def numbered(stem: str, folder: Path) -> list[str]:
    """Names of the files of a stem; they must be numbered without a gap."""
    found = sorted(path.name for path in folder.glob(f"{stem}-*.safetensors"))
    assert found == [f"{stem}-{number:05d}-of-{len(found):05d}.safetensors" for number in range(1, len(found) + 1)]
    return found


@EVERY
def test_the_files_hold_what_a_single_one_holds(kind: str, runs: Path) -> None:
    sharded, whole = runs / kind, runs / f"{kind}, whole"
    assert len(numbered("model", sharded)) > 2 and (sharded / MODEL_INDEX).is_file() and not (sharded / MODEL).exists()
    check_model_folder(sharded)
    assert same(tensors(weight_files(sharded)), load_file(whole / MODEL))
    for saved, expected in zip(checkpoints(sharded), checkpoints(whole), strict=True):
        stem, index = ("model.int8", INT8_INDEX) if "int8" in kind else ("model", MODEL_INDEX)
        assert len(numbered(stem, saved)) > 1 and (saved / index).is_file()
        assert same(tensors(weight_files(saved)), tensors(weight_files(expected)))
        states = numbered("optimizer", saved)
        assert len(states) > 1 and not (saved / OPTIMIZER_STATE).exists()
        assert same(tensors([saved / name for name in states]), load_file(expected / OPTIMIZER_STATE))
        listed = {path.name for path in saved.iterdir()} - {"manifest.json"}
        assert listed == set(saving.CheckpointManifest.read(saved / "manifest.json").files)


@posix
@pytest.mark.usefixtures("sharded")
@pytest.mark.parametrize(
    ("kind", "moment", "count"),
    [
        ("galore", "after a step", 5),
        ("adamw, bf16", "before the rename", 2),
        # A checkpoint has more than twenty files here.
        ("int8, folded late", "while saving", 30),
        ("galore", "after the rename", 2),
    ],
)
def test_killed_and_resumed_it_has_the_same_files(
    kind: str, moment: str, count: int, runs: Path, world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def child() -> int:
        kill_at(moment, count)
        carry_out(world, folder, *KINDS[kind])
        return 0

    assert run_forked(child, tmp_path / "log") == -signal.SIGKILL, (tmp_path / "log").read_text()
    left = list(folder.glob(".checkpoint-*.tmp"))
    assert bool(left) == (moment in ("before the rename", "while saving"))
    carry_out(world, folder, *KINDS[kind], resume=True)
    assert digests(folder) == digests(runs / kind)
    assert [path.name for path in checkpoints(folder)] == [path.name for path in checkpoints(runs / kind)]
    for path in checkpoints(folder):
        assert digests(path) == digests(runs / kind / path.name)
    assert not list(folder.glob(".*.tmp"))


@MOST
def test_it_resumes_from_other_numbers_of_files(kind: str, runs: Path, world: World, tmp_path: Path) -> None:
    """From several files into one, as after an update of this program, and from one into several."""
    for name, shards, expected in ((kind, False, f"{kind}, whole"), (f"{kind}, whole", True, kind)):
        folder = tmp_path / expected
        words = [*KINDS[kind], f"training.output_dir={folder}"]
        with pytest.MonkeyPatch.context() as patch:
            if shards:
                shard(patch)
            config = load_config(world.config, [*COMMON, *words])
            train(config, Callback(), resume=True, resume_from=runs / name / "checkpoint-2")
        assert digests(folder) == digests(runs / expected)


@pytest.mark.usefixtures("sharded")
@MOST
@pytest.mark.parametrize("to", ["bf16", "int8"])
def test_a_checkpoint_is_exported_and_resumed(kind: str, to: str, runs: Path, world: World, tmp_path: Path) -> None:
    made: list[dict[str, torch.Tensor]] = []
    for name in (kind, f"{kind}, whole"):
        output = tmp_path / name
        exported = command("export", str(runs / name / "checkpoint-2"), "--to", to, "--output", str(output))
        assert exported.code == 0, exported.err
        assert len(weight_files(output)) > 1 and len(numbered("optimizer", output)) > 1
        made.append(tensors(weight_files(output)))
        words = shlex.split(exported.out.partition("configuration and: ")[2])
        config = load_config(
            world.config, [*COMMON, *KINDS[kind], f"training.output_dir={tmp_path / 'run' / name}", *words[1:]]
        )
        assert train(config, Callback(), resume=True, resume_from=Path(words[0].partition("=")[2])).finished
    assert same(*made)
    assert digests(tmp_path / "run" / kind) == digests(tmp_path / "run" / f"{kind}, whole")


@EVERY
def test_the_final_model_answers_in_transformers(kind: str, runs: Path) -> None:
    found = find_weights(str(runs / kind), lambda said: None)
    assert found.folder == runs / kind
    tokens = torch.arange(9)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(runs / name)(tokens) for name in (kind, f"{kind}, whole"))
    assert torch.equal(one.logits, other.logits)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with taking_uploads(monkeypatch) as hub:
        yield hub


def test_a_run_is_pushed_with_all_of_its_files(hub: FakeHub, runs: Path, tmp_path: Path) -> None:
    pushed = command("push", str(runs / "galore"), HUB_ID)
    assert pushed.code == 0, pushed.err
    weights = {name for name in hub.pushed if "safetensors" in name}
    assert weights == {*numbered("model", runs / "galore"), MODEL_INDEX}
    for name, content in hub.pushed.items():
        (tmp_path / name).write_bytes(content)
    assert digests(tmp_path) == digests(runs / "galore")
    AutoModelForCausalLM.from_pretrained(tmp_path)


# Reads the model as llama.cpp's converter does, by its index, and writes it with the same package.
CONVERTER = """#!{python}
import json, pathlib, sys
from gguf import GGUFWriter
from safetensors.numpy import load_file
model, _, target, _, kind = sys.argv[1:6]
model = pathlib.Path(model)
places = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
writer = GGUFWriter(target, "llama")
for name, file in places.items():
    writer.add_tensor(name, load_file(model / file)[name])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.mark.usefixtures("sharded")
def test_a_run_is_given_to_the_converter_to_gguf(runs: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    converter = tmp_path / "convert-hf-to-gguf"
    converter.write_text(CONVERTER.format(python=sys.executable))
    converter.chmod(converter.stat().st_mode | stat.S_IXUSR)
    words = ["--to", "gguf", "--output", str(tmp_path / "mine"), "--converter", str(converter)]
    exported = command("export", str(runs / "galore"), *words)
    assert exported.code == 0, exported.err
    found = gguf.GGUFReader(tmp_path / "mine" / "mine-F16.gguf").tensors
    expected = load_file(runs / "galore, whole" / MODEL)
    assert {tensor.name for tensor in found} == expected.keys()
    for tensor in found:
        values = torch.from_numpy(tensor.data.copy()).view_as(expected[tensor.name])
        assert torch.equal(values, expected[tensor.name])


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_from(file: str, patch: pytest.MonkeyPatch) -> None:
    """The disk has no room for a file of this name, or one that begins like it."""
    begin = TensorWriter.write

    def write(self: TensorWriter, *given: Any) -> None:
        if Path(self._file.name).name.startswith(file):
            raise FULL
        begin(self, *given)

    patch.setattr(TensorWriter, "write", write)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("sharded")
@pytest.mark.parametrize("file", ["model-00003", "optimizer-00002"])
def test_a_disk_that_is_full_at_a_later_file_of_a_checkpoint(file: str, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        original, saved = run_output.save_checkpoint, []

        def save(*given: Any, **more: Any) -> Path:
            if saved:
                full_from(file, patch)
            saved.append(original(*given, **more))
            return saved[-1]

        patch.setattr(run_output, "save_checkpoint", save)
        with pytest.raises(EnvironmentProblem, match=r"The disk is full.*checkpoint-4 could not be saved"):
            carry_out(world, folder)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert find_checkpoint(folder, None).step == 2
    assert not list(folder.glob(".*.tmp"))
    carry_out(world, folder, resume=True)


@pytest.mark.usefixtures("sharded")
@pytest.mark.parametrize("file", ["model-00001", "model-00003"])
def test_a_disk_that_is_full_at_a_later_file_of_the_final_model(
    file: str, runs: Path, world: World, tmp_path: Path
) -> None:
    """The run was made longer: the final model that it had stays."""
    folder = tmp_path / "run"
    carry_out(world, folder)
    before = digests(folder)
    words = ["training.max_steps=7", "checkpoint.save_every_steps=0"]
    with pytest.MonkeyPatch.context() as patch:
        full_from(file, patch)
        with pytest.raises(EnvironmentProblem, match=r"The disk is full.*The final model could not") as caught:
            carry_out(world, folder, *words, resume=True)
    assert "--resume" in caught.value.remedy
    assert digests(folder) == before == digests(runs / "galore")
    check_model_folder(folder)
    assert not list(folder.glob(".*.tmp"))
    carry_out(world, folder, *words, resume=True)
    assert digests(folder).keys() == before.keys() and digests(folder) != before


@pytest.mark.usefixtures("sharded")
def test_a_model_in_one_file_gives_way_to_one_in_several(runs: Path, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        shard(patch, 10**9)
        carry_out(world, folder, "training.max_steps=3")
    assert (folder / MODEL).is_file() and not (folder / MODEL_INDEX).exists()
    carry_out(world, folder, resume=True)
    assert digests(folder) == digests(runs / "galore")


@pytest.mark.usefixtures("sharded")
@MOST
def test_the_best_model_is_loaded_from_several_files(
    kind: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, losses, done = LayerwiseEngine.forward, [6, 5, 4, 4.5], [0]

    def stepped(self: LayerwiseEngine, *given: Any, **more: Any) -> Any:
        done[0] = more["step"]
        return step(self, *given, **more)

    monkeypatch.setattr(LayerwiseEngine, "forward", stepped)
    monkeypatch.setattr(LayerwiseEngine, "evaluate", lambda self, batches: (losses[done[0]], 1))
    words = [*KINDS[kind], "checkpoint.save_every_steps=0", "training.eval_every_steps=1"]
    carry_out(world, tmp_path / "run", *words, "load_best_model_at_end=true", "training.max_steps=3")
    done[0] = 0
    carry_out(world, tmp_path / "short", *words, "training.max_steps=2")
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "checkpoint-2"
    assert len(numbered("model", tmp_path / "run")) > 2
    assert digests(tmp_path / "run") == digests(tmp_path / "short")
