"""Built-in specifications: each builds the model whose parameters were counted when it was published."""

from __future__ import annotations

import copy

import pytest
import torch

from sophia_galore.model.aliases import ALIASES, Alias
from sophia_galore.model.architecture import SUPPORTED
from sophia_galore.model.skeleton import build_skeleton, count_parameters, make_model_config
from sophia_galore.model.specifications import SPECIFICATIONS, Specification, find_specification

# As the hubs state them for the published weights, a tied head once; beside the table, so that a slip in one shows.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    # 4,300,079,472 with what sees images: 416,866,032 of the tower, 2,950,272 of the bridge to it.
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 2_950_272,
    "phi-3-mini": 3_821_079_552,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-v0.1": 7_241_732_096,
}


@pytest.mark.parametrize("known", SPECIFICATIONS, ids=lambda known: known.name)
def test_the_model_has_the_published_number_of_parameters(known: Specification) -> None:
    config = make_model_config(known.config, known.name)
    assert config.model_type in SUPPORTED
    assert config.dtype == torch.bfloat16, "all of them are published in bf16"
    assert count_parameters(config) == known.num_parameters == PUBLISHED[known.name]


def test_every_published_number_has_its_specification() -> None:
    assert [known.name for known in SPECIFICATIONS] == list(PUBLISHED)


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_every_alias_has_a_specification_under_each_of_its_names(alias: Alias) -> None:
    known = find_specification(alias.name)
    assert known is not None and known.name == alias.name
    assert find_specification(alias.hf) is known
    assert find_specification(alias.modelscope) is known


def test_an_id_belongs_to_one_specification() -> None:
    ids = [hub_id.lower() for known in SPECIFICATIONS for hub_id in known.hub_ids]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5-7B", "qwen2.5-7b"),
        ("qwen/qwen2.5-7b-instruct", "qwen2.5-7b"),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("qwen2.5-32b-instruct", "qwen2.5-32b"),
        ("Qwen/Qwen3-14B-Base", "qwen3-14b"),
        ("meta-llama/Meta-Llama-3.1-70B", "llama-3.1-70b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b-v0.1"),
        ("somebody/Qwen2.5-7B", None),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", None),
        ("qwen2.5", None),
        ("", None),
    ],
)
def test_names_in_use(name: str, expected: str | None) -> None:
    known = find_specification(name)
    assert (known.name if known else None) == expected


def test_gemma_alternates_its_windows_and_the_others_have_the_published_ones() -> None:
    windows = {known.name: known.config.get("sliding_window") for known in SPECIFICATIONS}
    assert {name: window for name, window in windows.items() if window} == {
        "gemma-3-270m": 512,
        "gemma-3-1b": 512,
        "gemma-3-4b": 1_024,
        "phi-3-mini": 2_047,
        "mistral-7b-v0.1": 4_096,
    }
    full = {
        known.name: known.config["layer_types"].count("full_attention")
        for known in SPECIFICATIONS
        if "layer_types" in known.config
    }
    assert full == {"gemma-3-270m": 3, "gemma-3-1b": 4, "gemma-3-4b": 5}


def test_building_a_model_leaves_the_table_as_it_is() -> None:
    known = find_specification("gemma-3-270m")
    assert known is not None
    before = copy.deepcopy(dict(known.config))
    config = make_model_config(known.config, known.name)
    config.layer_types[0] = "full_attention"
    build_skeleton(config, torch.device("cpu"))
    assert known.config == before
