"""What memory is planned for: a model, a device and what a step works on, without weights and without a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.check import check
from sophia_galore.config.schema_data import DataConfig
from sophia_galore.data.dataset import Dataset, load_data
from sophia_galore.data.read import is_here
from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.shapes import find_shape
from sophia_galore.model.skeleton import build_skeleton, load_tokenizer
from sophia_galore.plan.ask import ask_bitsandbytes, ask_device, ask_model, ask_parameters
from sophia_galore.plan.assume import Load, assumed_load, load_of_data
from sophia_galore.plan.decisions import Decisions, decide_step
from sophia_galore.plan.device import choose_device
from sophia_galore.plan.facts import DeviceFacts, Facts
from sophia_galore.plan.forecast import Estimate, estimate
from sophia_galore.plan.plan import count_steps
from sophia_galore.plan.rules import RULES
from sophia_galore.plan.verdicts import decide

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """What memory is planned for.

    Args:
        facts: The machine, the model and its parameters; the configuration in it may be replaced.
        model_config: The model's Hugging Face configuration.
        layer_names: Its layers, as prefixes of their parameters' names without the final dot.
        load: What a step works on, for a configuration.
        num_steps: Steps of the run, for a configuration.
        source: Where the model's shapes are known from.
    """

    facts: Facts
    model_config: Any
    layer_names: tuple[str, ...]
    load: Callable[[RunConfig], Load]
    num_steps: Callable[[RunConfig], int]
    source: str

    def decide(self, config: RunConfig) -> Decisions:
        """What would be done in a step of a configuration.

        Raises:
            UserError: Something speaks against it.
        """
        check(config)
        return decide_step(replace(self.facts, config=config))

    def estimate(self, config: RunConfig, *, keeps: bool) -> Estimate:
        """What a configuration will need.

        Args:
            config: The configuration.
            keeps: Whether forecasts for layers that keep their graphs are wanted too.

        Raises:
            UserError: Something speaks against it.
        """
        return estimate(
            self.decide(config),
            self.model_config,
            self.layer_names,
            self.load(config),
            num_steps=self.num_steps(config),
            keeps=keeps,
        )


def subject_of_data(
    facts: Facts, anatomy: Anatomy, dataset: Dataset, *, num_steps: int, pad_id: int, source: str
) -> Subject:
    """The subject of a run whose data have been read.

    Args:
        facts: What is known of the run.
        anatomy: The model's parts.
        dataset: The tokenised data.
        num_steps: Steps of the run.
        pad_id: The token id to pad with.
        source: Where the model came from.
    """
    return Subject(
        facts,
        anatomy.model.config,
        anatomy.layer_names,
        lambda config: load_of_data(config, dataset, num_steps, pad_id),
        lambda config: num_steps,
        source,
    )


def look_up(config: RunConfig, say: Callable[[str], None], *, reads_data: bool) -> Subject:
    """The subject of a plan: nothing is downloaded but a configuration, and no GPU need be here.

    Args:
        config: What is asked; `training.device` may name a GPU that this machine does not have.
        say: Takes lines for the user.
        reads_data: Read the training data, if they and the model's tokenizer are on this machine: the plan is then
            for their longest examples, else for examples of `training.max_length`.

    Raises:
        UserError: The model is not known, or something speaks against the run.
    """
    check(config)
    facts = Facts(config, device=planned_device(config.training.device))
    if facts.freezes_layers:
        facts = replace(facts, bitsandbytes=ask_bitsandbytes(_CPU))
    decide(RULES, facts)

    def refuse(model_config: Any) -> None:
        known = replace(facts, model=ask_model(model_config, name=config.model.name))
        if not known.is_buildable:
            decide(RULES, known)

    shape = find_shape(config.model, say, check=refuse)
    model = ask_model(shape.config, name=shape.name)
    anatomy = build_skeleton(shape.config, _CPU, trust_remote_code=config.model.trust_remote_code)
    facts = replace(facts, model=model, parameters=ask_parameters(anatomy))
    vocab_size = anatomy.embed.num_embeddings
    here = shape.folder is not None and all(is_here(source.path) for source in config.data.train_sources)
    if reads_data and here and shape.folder is not None:
        tokenizer = load_tokenizer(shape.folder, trust_remote_code=config.model.trust_remote_code)
        pad_id = pad_token(tokenizer)

        @cache  # a plan asks for the same data under many settings
        def read(data: DataConfig, max_length: int, seed: int) -> Dataset:
            return load_data(data, max_length=max_length, seed=seed, tokenizer=tokenizer)

        def load(asked: RunConfig) -> Load:
            dataset = read(asked.data, asked.training.max_length, asked.training.seed)
            return load_of_data(asked, dataset, count_steps(asked, dataset)[1], pad_id)

    else:

        def load(asked: RunConfig) -> Load:
            return assumed_load(asked, vocab_size)

    return Subject(facts, shape.config, anatomy.layer_names, load, _asked_steps, shape.source)


def planned_device(name: str) -> DeviceFacts:
    """What is known of the device that is planned for; a GPU that is not here is taken for one with bfloat16.

    Args:
        name: As `training.device`.

    Raises:
        EnvironmentProblem: There is no such kind of device.
    """
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return DeviceFacts(place="cuda:0", name="a CUDA card", real_bf16=True)
    return ask_device(choose_device(name))


def pad_token(tokenizer: Any) -> int:
    """A token to fill batches with; it is masked, so any known one will do.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """
    known_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known_ids if token is not None)


def _asked_steps(config: RunConfig) -> int:
    """Steps of a run whose data are not known: as many as were asked for, or enough for all that recurs."""
    return config.training.max_steps or 10**9
