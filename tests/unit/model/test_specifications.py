"""Built-in specifications: each builds the model whose parameters were counted when it was published."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from sophia_galore.model.aliases import ALIASES, Alias
from sophia_galore.model.architecture import SUPPORTED
from sophia_galore.model.skeleton import build_skeleton, count_parameters, make_model_config
from sophia_galore.model.specifications import SPECIFICATIONS, Specification, find_specification

# As the hubs state them for the published weights, a tied head once; beside the table, so that a slip in one shows.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
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
    "qwen3-30b-a3b": 30_532_122_624,
    # Without what sees images, and without the layer that predicts a second token.
    "qwen3.5-0.8b": 873_438_784 - 100_592_896 - 20_452_864,
    "qwen3.5-2b": 2_274_069_824 - 331_416_576 - 60_828_160,
    "qwen3.5-4b": 4_659_865_088 - 333_514_240 - 120_599_552,
    "qwen3.5-9b": 9_653_104_368 - 456_010_480 - 243_290_624,
    "qwen3.5-27b": 27_781_427_952 - 460_730_096 - 424_699_392,
    "qwen3.5-35b-a3b": 35_951_822_704 - 446_571_248 - 844_640_768,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    # 4,300,079,472 with what sees images: 416,866,032 of the tower, 2,950,272 of the bridge to it.
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 2_950_272,
    "gemma-3-12b": 12_187_325_040 - 416_866_032 - 4_424_832,
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - 6_194_304,
    # Without what sees and hears, without the keys and values of layers that take them from others (they are in the
    # files, but unused), and without one number for each layer, which is no parameter.
    "gemma-4-e2b": 5_123_178_051 - 475_728_160 - 18_880_512 - 35,
    "gemma-4-e4b": 7_996_156_490 - 478_087_456 - 55_055_616 - 42,
    "gemma-4-12b": 11_959_730_224 - 52_379_904 - 48,
    "gemma-4-26b-a4b": 25_805_933_872 - 572_792_112,
    # 2,304 are statistics of the tower.
    "gemma-4-31b": 31_273_088_876 - 575_741_232 - 60 - 2_304,
    "phi-3-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-v0.1": 7_241_732_096,
    # Without what sees images; the numbers of the FP8 files have two scales for each linear module of a layer besides.
    "ministral-3-3b": 3_849_090_048 - 420_083_712,
    "ministral-3-8b": 8_918_026_716 - 428_472_320 - 2 * 7 * 34,
    "ministral-3-14b": 13_945_032_240 - 438_958_080 - 2 * 7 * 40,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "olmoe-1b-7b": 6_919_161_856,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
    "granite-4.0-350m": 352_379_904,
    "granite-4.0-1b": 1_631_750_144,
    "granite-4.0-micro": 3_402_836_480,
    "granite-4.0-h-1b": 1_461_538_368,
    "granite-4.0-h-micro": 3_191_396_096,
    "granite-4.0-h-tiny": 6_939_037_248,
    "granite-4.0-h-small": 32_207_337_984,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    # In bf16; 704 numbers in fp32, which balance the experts, are no parameters.
    "lfm2-8b-a1b": 8_339_929_856,
    "gpt-oss-20b": 20_914_757_184,
    # Counted in files of another format.
    "glm-4-9b": 9_400_279_040,
    "ernie-4.5-0.3b": 360_748_032,
    # The files of another format leave out what balances 64 experts in each of 27 layers.
    "ernie-4.5-21b-a3b": 21_825_436_160 + 64 * 27,
    "exaone-4.0-1.2b": 1_279_391_488,
}
# Only a rounded number was found, and how far off rounding can be: in words, or as the size of the files in bf16.
ROUNDED = {
    "lfm3-1.7b": (1_730_000_000, 5_000_000),
    "hunyuan-0.5b": (1_080_000_000 // 2, 5_000_000 // 2),
    "hunyuan-1.8b": (1_800_000_000, 50_000_000),
    "hunyuan-4b": (8_440_000_000 // 2, 2 * 5_000_000 // 2),
    "hunyuan-7b": (15_017_000_000 // 2, 15_500_000 // 2),
}


@pytest.mark.parametrize("known", SPECIFICATIONS, ids=lambda known: known.name)
def test_the_model_has_the_published_number_of_parameters(known: Specification) -> None:
    config = make_model_config(known.config, known.name)
    assert config.dtype == torch.bfloat16, "all of them are published in bf16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == known.num_parameters
    exact = PUBLISHED.get(known.name, known.num_parameters)
    about, tolerance = ROUNDED.get(known.name, (exact, 0))
    assert abs(known.num_parameters - about) <= tolerance


def test_plan_counts_as_transformers_does() -> None:
    first: dict[str, Specification] = {}
    for known in SPECIFICATIONS:
        first.setdefault(known.config["model_type"], known)
    for model_type in SUPPORTED.keys() & first.keys():
        known = first[model_type]
        assert count_parameters(make_model_config(known.config, known.name)) == known.num_parameters


def test_every_published_number_has_its_specification() -> None:
    assert [known.name for known in SPECIFICATIONS if known.name not in ROUNDED] == list(PUBLISHED)
    assert [known.name for known in SPECIFICATIONS if known.name not in PUBLISHED] == list(ROUNDED)


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
        ("Qwen/Qwen3.5-4B-Base", "qwen3.5-4b"),
        ("google/gemma-4-E2B-it", "gemma-4-e2b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("LiquidAI/LFM2.5-1.2B-Instruct", "lfm2-1.2b"),
        ("mistralai/Ministral-3-8B-Instruct-2512", None),
        ("somebody/Qwen2.5-7B", None),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", None),
        ("qwen2.5", None),
        ("", None),
    ],
)
def test_names_in_use(name: str, expected: str | None) -> None:
    known = find_specification(name)
    assert (known.name if known else None) == expected


def test_the_windows_are_the_published_ones() -> None:
    windows = {known.name: known.config.get("sliding_window") for known in SPECIFICATIONS}
    assert {name: window for name, window in windows.items() if window} == {
        "gemma-3-270m": 512,
        "gemma-3-1b": 512,
        "gemma-3-4b": 1_024,
        "gemma-3-12b": 1_024,
        "gemma-3-27b": 1_024,
        "gemma-4-e2b": 512,
        "gemma-4-e4b": 512,
        "gemma-4-12b": 1_024,
        "gemma-4-26b-a4b": 1_024,
        "gemma-4-31b": 1_024,
        "phi-3-mini": 2_047,
        "phi-4-mini": 262_144,
        "mistral-7b-v0.1": 4_096,
        "olmo-3-7b": 4_096,
        "olmo-3-32b": 4_096,
        "lfm3-1.7b": 256,
        "gpt-oss-20b": 128,
    }


def test_kinds_of_layers_alternate_as_published() -> None:
    """Attention to all earlier tokens, and all layers; where they are is checked for one of each pattern."""
    kinds = {known.name: known.config["layer_types"] for known in SPECIFICATIONS if "layer_types" in known.config}
    full = {name: sum(kind in ("full_attention", "attention") for kind in each) for name, each in kinds.items()}
    assert {name: (full[name], len(each)) for name, each in kinds.items() if full[name] < len(each)} == {
        "qwen3.5-0.8b": (6, 24),
        "qwen3.5-2b": (6, 24),
        "qwen3.5-4b": (8, 32),
        "qwen3.5-9b": (8, 32),
        "qwen3.5-27b": (16, 64),
        "qwen3.5-35b-a3b": (10, 40),
        "gemma-3-270m": (3, 18),
        "gemma-3-1b": (4, 26),
        "gemma-3-4b": (5, 34),
        "gemma-3-12b": (8, 48),
        "gemma-3-27b": (10, 62),
        "gemma-4-e2b": (7, 35),
        "gemma-4-e4b": (7, 42),
        "gemma-4-12b": (8, 48),
        "gemma-4-26b-a4b": (5, 30),
        "gemma-4-31b": (10, 60),
        "olmo-3-7b": (8, 32),
        "olmo-3-32b": (16, 64),
        "granite-4.0-h-1b": (4, 40),
        "granite-4.0-h-micro": (4, 40),
        "granite-4.0-h-tiny": (4, 40),
        "granite-4.0-h-small": (4, 40),
        "lfm2-350m": (6, 16),
        "lfm2-700m": (6, 16),
        "lfm2-1.2b": (6, 16),
        "lfm2-2.6b": (8, 30),
        "lfm2-8b-a1b": (6, 24),
        "lfm3-1.7b": (6, 24),
        "gpt-oss-20b": (12, 24),
    }
    assert kinds["gpt-oss-20b"][:2] == ["sliding_attention", "full_attention"]
    assert kinds["qwen3.5-4b"][:4] == ["linear_attention"] * 3 + ["full_attention"]
    assert [index for index, kind in enumerate(kinds["granite-4.0-h-small"]) if kind != "mamba"] == [5, 15, 25, 35]
    assert kinds["lfm3-1.7b"][:5] == ["conv", "conv", "full_attention", "conv", "sliding_attention"]


@pytest.mark.parametrize("known", SPECIFICATIONS, ids=lambda known: known.name)
def test_every_layer_has_a_kind(known: Specification) -> None:
    kinds = known.config.get("layer_types")
    assert kinds is None or len(kinds) == known.config["num_hidden_layers"]


def test_building_a_model_leaves_the_table_as_it_is() -> None:
    known = find_specification("gemma-3-270m")
    assert known is not None
    before = copy.deepcopy(dict(known.config))
    config = make_model_config(known.config, known.name)
    config.layer_types[0] = "full_attention"
    build_skeleton(config, torch.device("cpu"))
    assert known.config == before
