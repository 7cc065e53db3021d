"""A run's final model replaces an earlier one, in one file or in several: killed anywhere, one of them is whole."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forked import run_forked
from sophia_galore.records.files import MODEL_INDEX, MODEL_WEIGHTS, WRITTEN, weights_entry
from sophia_galore.records.schema import find_json
from sophia_galore.train.folder import finish_replacing, replace_model
from sophia_galore.weights.manifest import check_model_folder
from sophia_galore.weights.saved import read_weights
from sophia_galore.weights.tensor_stream import TensorStream, write_stream

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
NAMES = ("a", "b", "c")
ROW_BYTES = 8
# Bytes in a file, so that it holds one tensor, two, or all three.
ONE, TWO, ALL = ROW_BYTES, 2 * ROW_BYTES, 3 * ROW_BYTES
# The user's, among them one that is called like a model's, but is listed nowhere.
OWN = {"notes.txt": b"mine", "adapter.safetensors": b"?", "model-00001-of-00009.safetensors": b"mine too"}


def writer(value: float, shard_bytes: int) -> Callable[[Path], None]:
    """A model whose weights all have a value, and a tokenizer that other values don't have."""

    def write(folder: Path) -> None:
        stream = TensorStream.of({name: torch.full((1, 2), float(value)) for name in NAMES})
        write_stream(folder, "model", stream, metadata={"format": "pt"}, shard_bytes=shard_bytes)
        for name in ("config.json", f"tokenizer-{value:.0f}.json"):
            (folder / name).write_text(f'{{"value": {value}}}')

    return write


def value_of(folder: Path) -> float | None:
    """The value of a folder's model; None if it has none. All of it must be of the same."""
    if weights_entry(folder) is None:
        return None
    found = {name: weight.values(torch.float32) for _, name, weight in read_weights(folder)}
    values = {float(value) for tensor in found.values() for value in tensor.flatten()}
    assert len(values) == 1 and found.keys() == set(NAMES)
    return values.pop()


def is_the_model(value: float, folder: Path) -> bool:
    """Whether the folder has exactly this model, beside the user's files."""
    listed = find_json(folder / WRITTEN)
    there = {path.name for path in folder.iterdir()} - OWN.keys()
    entry = weights_entry(folder)
    assert entry is not None
    expected = {entry.name, *(path.name for path, _, _ in read_weights(folder))}
    weights = {name for name in there if MODEL_WEIGHTS.fullmatch(name)}
    return value_of(folder) == value and weights == expected and {*listed, WRITTEN} <= there


SIZES = [(ALL, ONE), (ONE, ALL), (ONE, TWO), (ONE, ONE), (ALL, ALL)]
NAMED = pytest.mark.parametrize(
    ("before", "after"), SIZES, ids=["one to three", "three to one", "three to two", "three to three", "one to one"]
)


@NAMED
def test_an_earlier_model_is_replaced(before: int, after: int, tmp_path: Path) -> None:
    for number, size in enumerate((before, after, before), 1):
        replace_model(tmp_path, writer(number, size))
        assert is_the_model(number, tmp_path)
        check_model_folder(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def die_at(number: int) -> None:
    """Arrange that this process kills itself when it is about to open, move or delete a file for the nth time."""
    left = number

    def hook(event: str, given: object) -> None:
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@posix
@NAMED
def test_killed_at_any_moment(before: int, after: int, tmp_path: Path) -> None:
    """Until the next start there is the old one, the new one, or none, but never one of files of both."""
    seen: list[float | None] = []
    for number in range(1, 99):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in OWN.items():
            (folder / name).write_bytes(content)
        replace_model(folder, writer(1, before))

        def child(folder: Path = folder, number: int = number) -> int:
            die_at(number)
            replace_model(folder, writer(2, after))
            return 0

        code = run_forked(child, tmp_path / "log")
        seen.append(value_of(folder))
        finish_replacing(folder)
        found = value_of(folder)
        assert found is not None and (found == 2 or seen[-1] == 1), "what was whole is there"
        assert is_the_model(found, folder)
        assert {name: (folder / name).read_bytes() for name in OWN} == OWN
        replace_model(folder, writer(3, before))
        assert is_the_model(3, folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert seen[0] == 1 and seen[-1] == 2 and seen == sorted(seen, key=lambda value: (value is None) + 2 * (value == 2))

    # In several files it has no index for a moment; else one takes the other's place at once.
    assert (None in seen) == (after != ALL)


@posix
def test_killed_again_while_it_is_recovered(tmp_path: Path) -> None:
    for number in range(1, 40):
        folder = tmp_path / str(number)
        folder.mkdir()
        replace_model(folder, writer(1, ONE))
        whole = folder / ".files.whole.tmp"

        def stop(folder: Path = folder) -> int:
            def hook(event: str, given: tuple[object, ...]) -> None:
                if event == "os.remove" and str(given[0]).endswith(MODEL_INDEX):
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            replace_model(folder, writer(2, TWO))
            return 0

        def again(folder: Path = folder, number: int = number) -> int:
            die_at(number)
            finish_replacing(folder)
            return 0

        assert run_forked(stop, tmp_path / "log") == -signal.SIGKILL and whole.is_dir()
        code = run_forked(again, tmp_path / "log")
        finish_replacing(folder)
        assert is_the_model(2, folder) and not whole.exists()
        if code == 0:
            return
    raise AssertionError("it was never left alone")
