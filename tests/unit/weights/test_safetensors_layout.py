"""Files that are written tensor by tensor have the bytes that the library writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.weights.safetensors_layout import FileLayout, TensorWriter

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float64,
    torch.bool,
)
_TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    min_size=1,
    max_size=6,
)


def _layout(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> FileLayout:
    return FileLayout.of({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)


@given(_TENSORS, st.sampled_from([None, {"format": "pt"}, {"block_size": "128"}]))
def test_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str] | None,
) -> None:
    tensors = {name: torch.full(shape, 3).to(dtype) for name, (dtype, shape) in kinds.items()}
    path = tmp_path_factory.mktemp("layout") / "model.safetensors"
    with TensorWriter(path, _layout(tensors, metadata)) as writer:
        for name in reversed(tensors):  # any order
            writer.write(name, tensors[name])
    assert path.read_bytes() == safetensors.torch.save(tensors, metadata=metadata)


def test_rows_are_written_in_any_order(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).reshape(6, 2), "b": torch.arange(3, dtype=torch.int8)}
    path = tmp_path / "model.safetensors"
    with TensorWriter(path, _layout(tensors)) as writer:
        writer.write("a", tensors["a"][4:], 4)
        writer.write("b", tensors["b"])
        writer.write("a", tensors["a"][:4])
    assert path.read_bytes() == safetensors.torch.save(tensors)


def test_what_is_missing_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    layout = FileLayout.of({"a": (torch.float32, (3, 2)), "b": (torch.float32, (1,))})
    with (
        pytest.raises(ValueError, match=r"b \(and 0 more\) was not written"),
        TensorWriter(tmp_path / "x", layout) as one,
    ):
        one.write("a", torch.ones(3, 2))
    with TensorWriter(tmp_path / "x", layout) as other:
        with pytest.raises(ValueError, match="float64"):
            other.write("a", torch.ones(3, 2, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"\(3, 1\)"):
            other.write("a", torch.ones(3, 1))
        other.write("a", torch.ones(3, 2))
        other.write("b", torch.ones(1))
