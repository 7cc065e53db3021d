"""What is written opens in other programs and other versions; what is brought in is what it says it is.

`bench/opens_elsewhere.py` lets another transformers read the exports; here stand the keys that it reads, by value.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines import load_parts
from opens_elsewhere import compare
from sophia_galore.errors import ModelError
from sophia_galore.model import compatible_json
from sophia_galore.model.export import convert_model, write_model
from sophia_galore.model.skeleton import read_model_config
from sophia_galore.model.source_files import read_source_files
from sophia_galore.weights.manifest import check_model_folder, write_manifest
from tiny import CHATML, write_tiny_model

Json = dict[str, Any]

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0], "long_factor": [2.0]}

# What the source says, what must stand in the export, what must not.
CONFIGS: dict[str, tuple[Json, Json, tuple[str, ...]]] = {
    "old form stays": ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}, ("rope_parameters",)),
    "no rope settings": ({}, {}, ("rope_parameters", "rope_theta", "rope_scaling")),
    "new form": (
        {"rope_parameters": DEFAULT},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": DEFAULT},
        (),
    ),
    "new form, scaled": (
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        (),
    ),
    "both forms already": (
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        (),
    ),
    "partial rotation": (
        {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5, "rope_scaling": None},
        (),
    ),
    "gemma 3": (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        (),
    ),
    "phi 3": (
        {
            "model_type": "phi3",
            "rope_parameters": {
                **LONG,
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 16,
            },
        },
        # 4.x refuses a fourth field.
        {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 16, "rope_theta": 1e4},
        (),
    ),
    "torch_dtype only": ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}, ("dtype",)),
    "dtype only": ({"dtype": "float32"}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}, ()),
    "no dtype": ({}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}, ()),
    "cache off": ({"use_cache": False}, {"use_cache": True}, ()),
    "packing": (
        {"quantization_config": {"quant_method": "fp8"}, "quantization": {"bits": 4}, "compression_config": {}},
        {},
        ("quantization_config", "quantization", "compression_config"),
    ),
    "traces": ({"_name_or_path": "/home/me/model"}, {}, ("_name_or_path",)),
    "code that does not come along": ({"auto_map": {"AutoModel": "modeling.M"}}, {}, ("auto_map",)),
    "anything else": ({"something": [1, None], "architectures": ["X"]}, {"something": [1, None]}, ()),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_keys(case: str) -> None:
    source, expected, absent = CONFIGS[case]
    written = compatible_json.model_config(source, dtype="bfloat16", untied=False, keeps_code=False)
    assert {key: written[key] for key in expected} == expected
    assert not set(absent) & set(written)
    kept = [key for key in source if key in written]
    assert [key for key in written if key in kept] == kept, "in the source's order"
    again = compatible_json.model_config(written, dtype="bfloat16", untied=False, keeps_code=False)
    assert again == written, "an export of an export is the same"


@pytest.mark.parametrize(("said", "written"), [(True, False), (None, False), (False, False)])
def test_an_untied_head_is_said(said: bool | None, written: bool) -> None:
    source = {} if said is None else {"tie_word_embeddings": said}
    made = compatible_json.model_config(source, dtype="float32", untied=True, keeps_code=True)
    assert made["tie_word_embeddings"] is written
    assert (
        compatible_json.model_config(source, dtype="float32", untied=False, keeps_code=True).get("tie_word_embeddings")
        is said
    )


TOKENIZERS: dict[str, tuple[Json, Json, tuple[str, ...]]] = {
    "old form stays": (
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "extra_special_tokens": {}},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "extra_special_tokens": {}},
        (),
    ),
    "class of version 5": (
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        (),
    ),
    "class that means more in version 4": (
        {"tokenizer_class": "GemmaTokenizer", "backend": "tokenizers"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        (),
    ),
    "special tokens": (
        {"extra_special_tokens": ["<a>"], "tokenizer_class": "TokenizersBackend"},
        {"additional_special_tokens": ["<a>"]},
        ("extra_special_tokens",),
    ),
    "traces": (
        {"local_files_only": False, "is_local": True, "name_or_path": "/home/me"},
        {},
        ("local_files_only", "is_local", "name_or_path"),
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer_keys(case: str) -> None:
    source, expected, absent = TOKENIZERS[case]
    written = compatible_json.tokenizer_config(source, chat_template=None, whole=True, keeps_code=False)
    assert {key: written[key] for key in expected} == expected
    assert not set(absent) & set(written)


def exported(source: Path, target: Path, **more: Any) -> Path:
    """A folder loaded into a store and written out again."""
    _, store = load_parts(source)
    target.mkdir()
    write_model(target, store=store, dtype=None, source=read_source_files(source), **more)
    return target


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    content = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(content))


def test_what_training_did_not_change_keeps_its_bytes(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    edit(source / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", backend=None)
    (source / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    (source / "special_tokens_map.json").write_text('{ "eos_token":"<|im_end|>" }')
    (source / "LICENSE").write_text("Do what you like.")
    target = exported(source, tmp_path / "target")
    names = ["tokenizer_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "LICENSE"]
    names += ["generation_config.json", "chat_template.jinja"]
    assert [name for name in names if (target / name).read_bytes() != (source / name).read_bytes()] == []


def test_what_is_no_part_of_a_model_stays_behind(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    private = ["plan.json", "metrics.jsonl", "run_config.yaml", "optimizer.safetensors", "notes.txt", "code.py"]
    for name in private:
        (source / name).write_bytes(b"{}")
    target = exported(source, tmp_path / "target")
    assert [name for name in private if (target / name).exists()] == []


def test_python_files_come_along_where_they_are_run(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    edit(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (source / "modeling_x.py").write_text("X = None\n")
    kept, left = (read_source_files(source, with_code=trusted) for trusted in (True, False))
    assert (kept.has_code, left.has_code) == (True, False)
    assert "modeling_x.py" in kept.files and "modeling_x.py" not in left.files


def test_another_chat_format_is_written_for_new_and_old_programs(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    template = CHATML.replace("assistant", "model")
    target = exported(source, tmp_path / "target", chat_template=template, eos_token_ids=[2, 7])
    assert AutoTokenizer.from_pretrained(target).chat_template == template
    assert json.loads((target / "tokenizer_config.json").read_text())["chat_template"] == template
    assert (target / "chat_template.jinja").read_text() == template
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


@pytest.mark.parametrize(("stops", "written"), [([7], 7), ([2, 7], [2, 7])])
def test_generation_settings_are_made_where_there_are_none(stops: list[int], written: Any, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    (source / "generation_config.json").unlink()
    assert not (exported(source, tmp_path / "without") / "generation_config.json").exists()
    target = exported(source, tmp_path / "target", eos_token_ids=stops)
    made = json.loads((target / "generation_config.json").read_text())
    assert made == {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": written}


def split_head(folder: Path, *, shards: bool, scale: float = 2.0) -> Path:
    """A folder whose config.json ties a head that its weights hold a second time, scaled."""
    tensors = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}
    if not shards:
        save_file({**tensors, **head}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    names = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": head}
    for name, part in names.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in names.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_head_of_its_own_is_untied_and_that_is_said(family: str, shards: bool, tmp_path: Path) -> None:
    source = split_head(write_tiny_model(tmp_path / "source", family), shards=shards)
    said: list[str] = []
    config = read_model_config(source, say=said.append)
    assert config.tie_word_embeddings is False
    assert len(said) == 1 and "ties the head to the embedding" in said[0]
    tokens = torch.arange(3, 20)[None]
    original = AutoModelForCausalLM.from_pretrained(source, config=config)(tokens).logits
    for target in (exported(source, tmp_path / "trained"), tmp_path / "converted"):
        if not target.exists():
            target.mkdir()
            convert_model(source, target, torch.float32)
        assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(tokens).logits, original)


@pytest.mark.parametrize("shards", [False, True])
def test_a_second_copy_of_the_embedding_is_left_out(shards: bool, tmp_path: Path) -> None:
    source = split_head(write_tiny_model(tmp_path / "source"), shards=shards, scale=1.0)
    said: list[str] = []
    assert read_model_config(source, say=said.append).tie_word_embeddings is True and not said
    (tmp_path / "converted").mkdir()
    convert_model(source, tmp_path / "converted", torch.float32)
    for target in (exported(source, tmp_path / "trained"), tmp_path / "converted"):
        assert "lm_head.weight" not in load_file(target / "model.safetensors")
        assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is True


NAME = "model.layers.0.mlp.up_proj.weight"


def packed_as(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Put tensors in place of a weight; `weight=...` under its own name, others behind its name without .weight."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[NAME]
        weights |= {
            NAME.removesuffix("weight") + end.replace("__", "."): tensor.clone() for end, tensor in tensors.items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def declaring(**declared: Any) -> Json:
    """A config.json's declaration."""
    return {"quantization_config": declared}


CODES, HALF = torch.ones(96, 32, dtype=torch.uint8), torch.ones(96, 64, dtype=torch.float16)
WORDS = torch.ones(8, 96, dtype=torch.int32)
# What config.json says, what the weights are, and how the refusal calls it.
PACKED: dict[str, tuple[Json, Callable[[Path], None], str]] = {
    "bitsandbytes, 4 bits": (
        declaring(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False),
        packed_as(weight=CODES, weight__absmax=torch.ones(96)),
        "bitsandbytes in 4 bits",
    ),
    "bitsandbytes, 8 bits": (
        declaring(quant_method="bitsandbytes", load_in_8bit=True),
        packed_as(weight=torch.ones(96, 64, dtype=torch.int8), SCB=torch.ones(96)),
        "bitsandbytes in 8 bits",
    ),
    "GPTQ": (declaring(quant_method="gptq", bits=4), packed_as(qweight=WORDS, g_idx=WORDS[0], scales=HALF), "GPTQ"),
    "AWQ": (declaring(quant_method="awq", bits=4), packed_as(qweight=WORDS, qzeros=WORDS, scales=HALF), "AWQ"),
    "fp8": (
        declaring(quant_method="fp8", weight_block_size=[128, 128]),
        packed_as(weight=torch.ones(96, 64).to(torch.float8_e4m3fn), weight_scale_inv=torch.ones(1, 1)),
        "FP8",
    ),
    "mxfp4": (declaring(quant_method="mxfp4"), packed_as(weight_blocks=CODES, weight_scales=CODES), "MXFP4"),
    "compressed-tensors": (
        declaring(quant_method="compressed-tensors", format="pack-quantized"),
        packed_as(weight_packed=WORDS, weight_scale=HALF),
        "compressed-tensors",
    ),
    "HQQ": (declaring(quant_method="hqq"), packed_as(W_q=CODES), "HQQ"),
    "MLX": ({"quantization": {"bits": 4, "group_size": 64}}, packed_as(weight=CODES, scales=HALF), "MLX"),
    "one that is not known": (declaring(quant_method="new9"), packed_as(weight=CODES), "new9"),
    "GPTQ, not declared": ({}, packed_as(qweight=WORDS, scales=HALF), "GPTQ or AWQ"),
    "fp8, not declared": ({}, packed_as(weight=torch.ones(96, 64).to(torch.float8_e5m2)), "FP8"),
    "integers, not declared": ({}, packed_as(weight=WORDS), "tensors of type I32"),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_are_refused_by_name(case: str, tmp_path: Path) -> None:
    declared, pack, called = PACKED[case]
    folder = write_tiny_model(tmp_path / "model")
    edit(folder / "config.json", **declared)
    pack(folder)
    (folder / "README.md").write_text("---\nbase_model:\n- someone/plain\n---\n# Packed\n")
    with pytest.raises(ModelError, match="is quantised") as caught:
        read_model_config(folder)
    assert called in caught.value.cause
    assert "someone/plain" in caught.value.remedy and "ownload the model again" not in caught.value.remedy


@pytest.mark.parametrize("case", [case for case, (declared, _, _) in PACKED.items() if declared])
def test_a_declaration_beside_full_precision_is_dropped_and_said(case: str, tmp_path: Path) -> None:
    declared, _, called = PACKED[case]
    folder = write_tiny_model(tmp_path / "model")
    edit(folder / "config.json", **declared)
    said: list[str] = []
    config = read_model_config(folder, say=said.append)
    assert len(said) == 1 and called in said[0] and "full precision" in said[0]
    assert getattr(config, "quantization_config", None) is None
    target = exported(folder, tmp_path / "target")
    assert not {"quantization_config", "quantization"} & set(json.loads((target / "config.json").read_text()))


def without(*names: str) -> Callable[[Path], None]:
    """Remove files."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/base"}')


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def ours(folder: Path) -> None:
    write_manifest(folder, name="someone/tiny", source="hf", revision="", has_code=False)
    (folder / "manifest-made").touch()
    (folder / "model.safetensors").unlink()


# What is wrong with a folder, how that is said, and what the remedy says.
FOLDERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "an adapter": (adapter, "holds an adapter of someone/base", "merge_and_unload"),
    "pickles only": (as_bin, r"holds no \*.safetensors file", "save_pretrained"),
    "cut short, made by hand": (cut_short, "bytes instead of", "Copy the folder again"),
    "no weights, made by hand": (without("model.safetensors"), r"holds no \*.safetensors", "Copy the folder again"),
    "no config": (without("config.json"), "holds no config.json", "Give the folder"),
    "downloaded": (ours, r"holds no \*.safetensors", "sophia-galore download someone/tiny"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_no_model(case: str, tmp_path: Path) -> None:
    change, said, remedy = FOLDERS[case]
    folder = write_tiny_model(tmp_path / "model")
    change(folder)
    with pytest.raises(ModelError, match=said) as caught:
        check_model_folder(folder)
    assert remedy in caught.value.remedy


def test_an_index_beside_the_whole_file_is_passed_over(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    check_model_folder(folder)
    target = exported(folder, tmp_path / "target")
    assert not (target / "model.safetensors.index.json").exists()


@pytest.mark.skipif(
    "OTHER_TRANSFORMERS_PYTHON" not in os.environ,
    reason="OTHER_TRANSFORMERS_PYTHON names no interpreter with another transformers",
)
def test_another_transformers_reads_the_same(tmp_path: Path) -> None:
    rows = compare(sys.executable, os.environ["OTHER_TRANSFORMERS_PYTHON"], tmp_path)
    assert [row for row in rows if row.error or not row.same] == []
    # Worst seen 3.3e-5, of logits up to 60: Gemma 2, where the two versions differ by as much over the source itself.
    assert max(row.difference for row in rows) < 1e-4
