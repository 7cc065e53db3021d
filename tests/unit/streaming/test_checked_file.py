"""Files of streamed tensors: what is read is what was written, whatever happened in between, or an error says so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sophia_galore.errors import RunError
from sophia_galore.streaming.checked_file import CheckedFile
from sophia_galore.weights.safetensors_layout import FileLayout

LAYOUT = FileLayout.of(
    {"codes": (torch.int8, (10, 6)), "scales": (torch.bfloat16, (10, 2)), "norm": (torch.float32, (5,))}
)
ROWS = {"codes": 4, "scales": 4}


def made(path: Path) -> CheckedFile:
    return CheckedFile(path, LAYOUT, ROWS)


def fill(file: CheckedFile, value: int) -> None:
    for name, span in LAYOUT.spans.items():
        file.write(name, 0, memoryview(bytes([value]) * span.num_bytes))
    file.commit()


def content(file: CheckedFile, name: str) -> bytes:
    found = bytearray(LAYOUT.spans[name].num_bytes)
    file.read(name, 0, memoryview(found))
    return bytes(found)


def test_a_new_one_is_zero_and_opens_elsewhere(tmp_path: Path) -> None:
    file = made(tmp_path / "layer.safetensors")
    assert all(not any(content(file, name)) for name in LAYOUT.spans)
    tensors = load_file(tmp_path / "layer.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: span.shape for name, span in LAYOUT.spans.items()
    }


_MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from(list(LAYOUT.spans)), st.integers(0, 2), st.integers(1, 255)),
        st.tuples(st.sampled_from(["commit", "keep"]), st.just(""), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@given(_MOVES)
def test_it_is_an_array_of_bytes_whose_past_stays(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, str, int, int]]
) -> None:
    """Against plain bytearrays: writes of blocks, commits, and links, which never change afterwards."""
    folder = tmp_path_factory.mktemp("file")
    file = made(folder / "layer.safetensors")
    model = {name: bytearray(span.num_bytes) for name, span in LAYOUT.spans.items()}
    kept: list[tuple[Path, dict[str, bytes]]] = []
    for kind, name, number, value in moves:
        if kind == "write":
            block = ROWS.get(name, 0) * LAYOUT.spans[name].row_bytes or LAYOUT.spans[name].num_bytes
            low = number * block % len(model[name]) // block * block
            high = min(low + block, len(model[name]))
            model[name][low:high] = bytes([value]) * (high - low)
            file.write(name, low, memoryview(bytes(model[name][low:high])))
        elif kind == "commit":
            file.commit()
        else:
            file.commit()
            path = folder / f"kept-{len(kept)}"
            file.keep_as(path)
            kept.append((path, {name: bytes(data) for name, data in model.items()}))
        assert all(content(file, name) == model[name] for name in LAYOUT.spans)
    for path, expected in kept:
        for name, tensor in load_file(path).items():
            assert bytes(tensor.view(torch.uint8).numpy().tobytes()) == expected[name]


@pytest.mark.parametrize("start", range(0, 60, 7))
@pytest.mark.parametrize("size", [1, 6, 24, 31])
def test_any_bytes_can_be_read(start: int, size: int, tmp_path: Path) -> None:
    file = made(tmp_path / "layer.safetensors")
    whole = bytes(range(60))
    file.write("codes", 0, memoryview(whole))
    found = bytearray(min(size, 60 - start))
    file.read("codes", start, memoryview(found))
    assert bytes(found) == whole[start : start + size]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 16
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (_flip, "is not what was written"),
    "cut short": (lambda path: os.truncate(path, path.stat().st_size - 3), "it was cut short"),
    "removed": (lambda path: path.unlink(), "it is gone"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_at_the_next_read(kind: str, tmp_path: Path) -> None:
    file = made(tmp_path / "layer.safetensors")
    fill(file, 7)
    damage, words = DAMAGE[kind]
    damage(file.path)
    with pytest.raises(RunError, match=words) as found:
        for name in LAYOUT.spans:
            content(file, name)
    assert str(file.path) in found.value.cause and "--resume" in found.value.remedy


def test_damage_is_not_copied_into_a_new_file(tmp_path: Path) -> None:
    file = made(tmp_path / "layer.safetensors")
    fill(file, 7)
    file.keep_as(tmp_path / "kept")
    _flip(file.path)
    file.write("norm", 0, memoryview(bytes(20)))
    with pytest.raises(RunError, match="is not what was written"):
        file.commit()


def test_a_removed_file_is_not_written_to(tmp_path: Path) -> None:
    file = made(tmp_path / "layer.safetensors")
    file.path.unlink()
    with pytest.raises(RunError, match="it is gone"):
        file.write("norm", 0, memoryview(bytes(20)))


def test_without_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    file = made(tmp_path / "layer.safetensors")
    fill(file, 7)
    file.keep_as(tmp_path / "kept")
    inode = file.path.stat().st_ino
    fill(file, 8)
    assert file.path.stat().st_ino == inode, "nothing is linked, so it is changed in place"
    assert set(load_file(tmp_path / "kept")["norm"].view(torch.uint8).tolist()) == {7}


def test_each_byte_is_written_once_after_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sophia_galore.streaming import checked_file

    written = 0
    before = checked_file.write_all

    def counted(file: object, content: memoryview, place: int) -> None:
        nonlocal written
        written += len(content)
        before(file, content, place)  # type: ignore[arg-type]

    file = made(tmp_path / "layer.safetensors")
    fill(file, 1)
    file.keep_as(tmp_path / "kept")
    monkeypatch.setattr(checked_file, "write_all", counted)
    fill(file, 2)
    assert written == LAYOUT.file_bytes
    fill(file, 3)
    assert written == LAYOUT.file_bytes + LAYOUT.data_bytes
