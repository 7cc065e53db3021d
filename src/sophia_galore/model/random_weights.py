"""A model with random weights, for pre-training: the folder that training then reads like any other.

Weights are drawn by the model's own code, as transformers initialises a new model, on the CPU in float32. They are a
function of the configuration, the seed and the versions of torch and transformers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import ModelError, short
from sophia_galore.model.cache import Say, cached, fill, require_space
from sophia_galore.model.skeleton import check_causal, config_digest, count_parameters, read_model_config
from sophia_galore.model.source import ResolvedModel, find_local, resolve_model
from sophia_galore.model.source_files import CONFIG, SourceFiles, read_source_files

SOURCE = "random weights"
"""What a run's records say of where its model came from."""


def random_model(settings: ModelConfig, seed: int, say: Say) -> ResolvedModel:
    """Make a model with random weights, or find the one that was made from the same before.

    Args:
        settings: Which model; of a folder, `config.json` and the tokenizer's files are enough.
        seed: Determines the weights.
        say: Called with each line for the user.

    Returns:
        The model, in a folder of the cache.

    Raises:
        ModelError: The model is unknown, or transformers can't make one with random weights.
        EnvironmentProblem: There is no room for it.
    """
    path = find_local(settings)
    plan = path if path is not None and path.is_dir() else resolve_model(settings, say).folder
    if not (plan / CONFIG).is_file():
        raise ModelError(
            f"{plan} holds no {CONFIG}, so it is not a model folder.",
            f"Give a folder that holds {CONFIG} and the tokenizer's files.",
        )
    trust = settings.trust_remote_code
    config = read_model_config(plan, trust_remote_code=trust, say=say)
    check_causal(config)
    files = read_source_files(plan, with_code=trust)
    cache = Path(settings.cache_dir).expanduser()
    folder = cache / f"random-{_digest(config, files, seed)}"
    if not cached(folder, needs_code=trust, deep=False):
        say(f"Drawing random weights for {settings.name} (seed {seed}) in {folder}.")
        cache.mkdir(parents=True, exist_ok=True)
        require_space(cache, 4 * count_parameters(config))

        def work(staging: Path) -> str:
            for name, content in files.files.items():
                (staging / name).write_bytes(content)
            _draw(config, seed, trust).save_pretrained(staging)
            return str(seed)

        fill(folder, work, say, name=settings.name, source="random", needs_code=trust, resumable=False)
    return ResolvedModel(folder, settings.name, SOURCE)


def _draw(config: Any, seed: int, trust_remote_code: bool) -> Any:
    """Return a Hugging Face model with random weights in float32; torch's own generator is left as it was."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"transformers can't make a new model of this {CONFIG}: {short(error)}.", "Check the file."
            ) from error


def _digest(config: Any, files: SourceFiles, seed: int) -> str:
    """Return a digest of everything that decides about the folder."""
    import torch
    import transformers

    contents = {name: hashlib.sha256(content).hexdigest() for name, content in files.files.items()}
    return config_digest(config, contents, seed, (torch.__version__, transformers.__version__))[:16]
