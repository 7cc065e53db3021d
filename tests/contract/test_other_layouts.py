"""Folders whose tensors are otherwise than the model: what is read and written again without training is the same.

A model is written by transformers, in the layout of hubs; it is read into a store, and written again, straight away and
by way of a checkpoint, which has the skeleton's names.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from other_models import CONVERTED, MIXTURES, WHOLE, differing, other_model, tensors_in
from sophia_galore.engine.whole import whole_model
from sophia_galore.errors import ModelError
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.export import convert_model, write_model
from sophia_galore.model.folder_layout import FolderLayout, find_layout, load_buffers
from sophia_galore.model.skeleton import build_skeleton, load_model_config
from sophia_galore.model.source_files import SOURCE_TENSORS, read_source_files
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.train.best_checkpoint import load_weights
from sophia_galore.weights.file_store import FileStore
from sophia_galore.weights.files import load_store
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.saved import matching_weights
from sophia_galore.weights.store import WeightStore

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 20)[None]
# One of each kind of conversion: experts apart, experts in one tensor, buffers, a class of its own for the whole.
QUICK = ("qwen3_moe", "gpt_oss", "apertus", "gemma3")


def thoroughly(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in names]


def opened(folder: Path) -> tuple[Architecture, FolderLayout, WeightStore]:
    architecture = build_skeleton(load_model_config(folder), CPU)
    layout = find_layout(folder, architecture)
    store = load_store(
        folder,
        architecture.parameter_shapes(),
        tied_head=None,
        dtype=torch.float32,
        device=CPU,
        layout=layout.reading,
    )
    load_buffers(folder, layout, architecture)
    return architecture, layout, store


def logits_of(folder: Path, kind: type) -> torch.Tensor:
    model: Any = kind.from_pretrained(folder).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", thoroughly([*CONVERTED, *WHOLE]))
def test_what_is_read_and_written_again_is_the_same(name: str, tied: bool, tmp_path: Path) -> None:
    source, written, checkpoint, exported = (
        tmp_path / each for each in ("source", "written", "checkpoint", "exported")
    )
    model = other_model(name, tied=tied)
    model.save_pretrained(source)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    architecture, layout, store = opened(source)
    with whole_model(architecture, store) as ours, torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, expected)
    for folder in (written, checkpoint):
        folder.mkdir()
        write_model(
            folder,
            store=store,
            dtype=None,
            source=read_source_files(source),
            layout=layout,
            beside=source,
            as_source=folder is written,
        )
    exported.mkdir()
    convert_model(checkpoint, exported, torch.float32)
    assert not differing(source, written)
    assert not differing(source, exported)
    assert not (exported / SOURCE_TENSORS).exists()
    assert torch.equal(logits_of(written, type(model)), expected)
    assert torch.equal(logits_of(exported, type(model)), expected)


def test_the_best_weights_are_found_in_the_layout_of_the_source_too(tmp_path: Path) -> None:
    """A checkpoint that was converted is an ordinary folder."""
    other_model("qwen3_moe").save_pretrained(tmp_path)
    _, layout, store = opened(tmp_path)
    expected = {name: weight.values(torch.float32).clone() for name, weight in store.items()}
    for _, weight in store.items():
        weight.write(torch.zeros(weight.shape), None)
    found: Any = SimpleNamespace(folder=tmp_path)
    load_weights(found, store, ParamOptimizer([], seed=0, device=CPU), layout.reading.read)
    assert all(torch.equal(weight.values(torch.float32), expected[name]) for name, weight in store.items())


@pytest.mark.parametrize("name", thoroughly(MIXTURES))
def test_weights_that_stay_in_files_are_the_same(name: str, tmp_path: Path) -> None:
    other_model(name).save_pretrained(tmp_path)
    architecture, layout, store = opened(tmp_path)
    shapes = architecture.parameter_shapes()
    files = FileStore.of(tmp_path, shapes, tied_head=None, device=CPU, layout=layout.reading)
    for name_, weight in store.items():
        with files.borrow(name_) as lent:
            assert torch.equal(lent[name_].values(torch.float32), weight.values(torch.float32))


@pytest.mark.parametrize("name", thoroughly(["qwen3_moe", "gemma3"]))
def test_in_eight_bits_the_layout_is_that_of_the_skeleton(name: str, tmp_path: Path) -> None:
    source, packed, plain = (tmp_path / each for each in ("source", "packed", "plain"))
    other_model(name).save_pretrained(source)
    packed.mkdir()
    plain.mkdir()
    convert_model(source, packed, Int8Format())
    convert_model(packed, plain, torch.float32)
    before, after = tensors_in(source), tensors_in(plain)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=0.02) for key in before)
    architecture, layout, _ = opened(packed)
    assert all(
        weight.kind.is_packed
        for weight in matching_weights(packed, architecture.parameter_shapes(), None, layout.reading.read)
        if len(weight.kind.shape) == 2
    )


def test_heads_that_predict_further_tokens_are_carried_along(tmp_path: Path) -> None:
    source, written = tmp_path / "source", tmp_path / "written"
    other_model("qwen3_5").save_pretrained(source)
    file = source / "model.safetensors"
    more = {"mtp.layers.0.weight": torch.rand(3, 5).bfloat16(), "mtp.norm.weight": torch.tensor(2.0)}
    more["model.visual.position_ids"] = torch.arange(3)
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    _, layout, store = opened(source)
    assert set(more) <= set(layout.writing.untrained)
    assert "tensors of the model's folder are not trained" in layout.remark()
    written.mkdir()
    write_model(
        written, store=store, dtype=torch.float32, source=read_source_files(source), layout=layout, beside=source
    )
    assert not differing(source, written)


def experts_of(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    other_model("qwen3_moe").save_pretrained(folder)
    return folder / "model.safetensors", load_file(folder / "model.safetensors")


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    file, tensors = experts_of(tmp_path)
    del tensors[EXPERT]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="3 of 4 experts have"):
        opened(tmp_path)


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    file, tensors = experts_of(tmp_path)
    tensors[EXPERT] = tensors[EXPERT][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not fit together: a shape is"):
        opened(tmp_path)


def test_a_tensor_that_nothing_knows_is_named(tmp_path: Path) -> None:
    file, tensors = experts_of(tmp_path)
    save_file(tensors | {"model.layers.1.mlp.extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds model\.layers\.1\.mlp\.extra\.weight, which this architecture"):
        opened(tmp_path)


def test_a_layer_whose_experts_are_not_there_is_missing(tmp_path: Path) -> None:
    file, tensors = experts_of(tmp_path)
    save_file({key: value for key, value in tensors.items() if "layers.1.mlp.experts" not in key}, file)
    with pytest.raises(ModelError, match=r"lacks 8 weights, the first is model\.layers\.1\.mlp\.experts"):
        opened(tmp_path)


def test_a_buffer_of_another_shape_is_named(tmp_path: Path) -> None:
    other_model("apertus").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("act_fn.beta"))
    save_file(tensors | {key: torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"act_fn\.beta has shape \(3,\), config\.json says"):
        opened(tmp_path)


def test_a_file_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    file, _ = experts_of(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        opened(tmp_path)


def test_experts_in_one_tensor_as_transformers_has_them_are_read_too(tmp_path: Path) -> None:
    model = other_model("qwen3_moe")
    model.config.save_pretrained(tmp_path)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    architecture, _, store = opened(tmp_path)
    with whole_model(architecture, store) as ours, torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, model(TOKENS).logits)


def test_rope_settings_of_each_kind_of_layer_stay(tmp_path: Path) -> None:
    """What transformers 5 would take for the rope of all layers is not written for a model that 4.x does not know."""
    other_model("gemma4_text").save_pretrained(tmp_path / "source")
    (tmp_path / "written").mkdir()
    convert_model(tmp_path / "source", tmp_path / "written", torch.float32)
    one, other = (transformers.AutoConfig.from_pretrained(tmp_path / each) for each in ("source", "written"))
    assert one.rope_parameters == other.rope_parameters
