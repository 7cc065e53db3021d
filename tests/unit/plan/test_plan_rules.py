"""Every verdict of the table: a case in which it speaks, and cases one step away in which it does not."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from sophia_galore.config.dump import changed
from sophia_galore.config.schema import RunConfig
from sophia_galore.engine.proof import Proof
from sophia_galore.errors import ConfigError, EnvironmentProblem, ModelError, UserError
from sophia_galore.plan.facts import (
    BitsandbytesFacts,
    DataFacts,
    DeviceFacts,
    Facts,
    MemoryFacts,
    ModelFacts,
    Param,
    RouteFacts,
)
from sophia_galore.plan.rules import RULES, compute_dtype, optimizer
from sophia_galore.plan.verdicts import Decided, FallBack, Refuse, Rule, Use, decide, describe, settled

CPU = DeviceFacts()
PASCAL = DeviceFacts("cuda:0", "GTX 1080", (6, 1))
TURING = DeviceFacts("cuda:0", "RTX 2080", (7, 5))
AMPERE = DeviceFacts("cuda:0", "A100", (8, 0), real_bf16=True)

LATE = {"load_in_8bit": True, "fold": "refresh"}
BNB = {"load_in_8bit": True, "backend": "bitsandbytes"}
WORKS = BitsandbytesFacts("0.50.2")
PARAMS = (Param("embed", (320, 64), part="embed"), Param("q", (64, 64), is_linear=True), Param("norm", (64,), "norm"))
MODEL = ModelFacts("llama", 512, 320, name="some/model")
DATA = DataFacts(largest_token=319, largest_known=319, num_steps=10)
WRONG = Proof(problem="This llama model would get wrong gradients: that of model.layers.0.q differs by 3 %.")
PROVEN = Proof(parameter="model.layers.0.q", difference=1.2e-7, num_parameters=5000, num_layers=2)
LEAKING = replace(PROVEN, packing_problem="Packed examples would see each other.")
FEW, MOST = RouteFacts(0.2, 2, 1), RouteFacts(0.8, 2, 1)
GIB = 2**30
TOO_MUCH = MemoryFacts(needed_bytes=3 * GIB + GIB // 2, limit_bytes=4 * GIB, reserve_bytes=GIB)
APART = MemoryFacts(2 * GIB, 4 * GIB, GIB, full_gradients="matrix")
STREAMS = MemoryFacts(
    2 * GIB, 4 * GIB, GIB, "With their optimizer states, 2 of 4 layers live in host memory (1.00 GiB)"
)


def asked(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(sections)


def facts(**more: Any) -> Facts:
    """Facts against which nothing speaks, but for what is given."""
    sections = {key: more.pop(key) for key in ("training", "optimizer", "quantization", "distributed") if key in more}
    if "asked_data" in more:
        sections["data"] = more.pop("asked_data")
    known = {"device": AMPERE, "model": MODEL, "parameters": PARAMS, "data": DATA, "routes": FEW, **more}
    return Facts(asked(**sections), **known)


@dataclass(frozen=True)
class Case:
    """A rule's case.

    Args:
        fires: Facts in which it speaks.
        verdict: What it says is done.
        words: What its text says.
        quiet: Facts one step away, in which it does not.
        error: What is raised, if it refuses.
    """

    fires: list[Facts]
    verdict: str
    words: list[str]
    quiet: list[Facts]
    error: type[UserError] | None = None


def trainable(*patterns: str, **more: Any) -> Facts:
    return facts(training={"trainable": patterns}, **more)


def evaluated(num_evaluations: int | None, **training: Any) -> Facts:
    return facts(training=training, data=replace(DATA, num_evaluations=num_evaluations))


def clipping(by: str, routes: RouteFacts, **more: Any) -> Facts:
    return facts(training={"max_grad_norm": 0.5, "clip_by": by}, routes=routes, **more)


def dtype(name: str, device: DeviceFacts) -> Facts:
    return facts(training={"compute_dtype": name}, device=device)


def with_model(**changes: Any) -> Facts:
    return facts(model=replace(MODEL, **changes))


def with_data(**changes: Any) -> Facts:
    return facts(data=replace(DATA, **changes))


def on_oom(what: str, memory: MemoryFacts | None = TOO_MUCH) -> Facts:
    known = facts(memory=memory)
    return replace(known, config=changed(known.config, {"memory.on_oom": what}))


SKIPS = {"load_in_8bit": True, "skip": ["q", "nix*"]}
CASES: dict[str, Case] = {
    "bf16_emulated": Case(
        [dtype("auto", TURING), dtype("auto", PASCAL)],
        "fall back to fp16",
        ["no bfloat16", "compute capability", "fp16 is used"],
        [dtype("auto", AMPERE), dtype("auto", CPU), dtype("fp32", TURING), dtype("fp16", PASCAL)],
    ),
    "bf16_refused": Case(
        [dtype("bf16", TURING), dtype("bf16", PASCAL), dtype("bf16", replace(TURING, capability=None))],
        "refuse",
        ["has no bfloat16 arithmetic", "training.compute_dtype=auto"],
        [dtype("bf16", AMPERE), dtype("bf16", CPU), dtype("auto", TURING)],
        EnvironmentProblem,
    ),
    "fp16_scaled": Case(
        [dtype("fp16", AMPERE), dtype("fp16", CPU), dtype("auto", TURING)],
        "use",
        ["each layer by a factor of its own", "nothing is stored in fp16"],
        [dtype("auto", AMPERE), dtype("bf16", AMPERE), dtype("fp32", TURING), dtype("auto", CPU)],
    ),
    "slow_on_cpu": Case(
        [dtype("bf16", CPU), dtype("fp16", CPU)],
        "use",
        ["slower than fp32 on a CPU", "compute_dtype=fp32"],
        [dtype("auto", CPU), dtype("fp32", CPU), dtype("bf16", AMPERE), dtype("fp16", TURING)],
    ),
    "bitsandbytes_missing": Case(
        [facts(quantization=BNB, bitsandbytes=BitsandbytesFacts())],
        "refuse",
        ["not installed", 'pip install "sophia-galore[bitsandbytes]"', "quantization.backend=native"],
        [
            facts(quantization=BNB, bitsandbytes=WORKS),
            facts(quantization={**BNB, "load_in_8bit": False}, bitsandbytes=BitsandbytesFacts()),
            facts(quantization={"load_in_8bit": True}, bitsandbytes=BitsandbytesFacts()),
        ],
        EnvironmentProblem,
    ),
    "bitsandbytes_broken": Case(
        [facts(quantization=BNB, bitsandbytes=BitsandbytesFacts("0.50.2", "No compatible CUDA binary found"))],
        "refuse",
        ["bitsandbytes 0.50.2 does not work on A100: No compatible CUDA binary found.", "python -m bitsandbytes"],
        [
            facts(quantization=BNB, bitsandbytes=WORKS),
            facts(quantization={"load_in_8bit": True}, bitsandbytes=BitsandbytesFacts("0.50.2", "No")),
        ],
        EnvironmentProblem,
    ),
    "tracker_missing": Case(
        [facts(missing_trackers=("wandb", "mlflow"))],
        "refuse",
        ["asks for what is not installed: wandb,mlflow.", 'pip install "sophia-galore[wandb,mlflow]"', "leave it out"],
        [facts(), facts(training={"report_to": ("wandb",)})],
        EnvironmentProblem,
    ),
    "another_model": Case(
        [with_model(instead_of="big/model")],
        "fall back to some/model",
        ["No source could be reached for big/model: some/model is trained instead."],
        [facts()],
    ),
    "positions": Case(
        [facts(training={"max_length": 513})],
        "refuse",
        ["max_length is 513, but the model knows 512 positions", "training.max_length=512 or less"],
        [
            facts(training={"max_length": 512}),
            facts(training={"max_length": 513}, model=replace(MODEL, positions=None)),
        ],
        ConfigError,
    ),
    "not_proven": Case(
        [facts(proof=WRONG), facts(proof=WRONG, asked_data={"packing": True})],
        "refuse",
        [WRONG.problem, "another architecture"],
        [facts(), facts(proof=PROVEN), facts(proof=LEAKING)],
        ModelError,
    ),
    "packing_not_proven": Case(
        [facts(proof=LEAKING, asked_data={"packing": True})],
        "refuse",
        ["data.packing is not possible with this llama model: Packed examples would see", "data.packing=false"],
        [facts(proof=LEAKING), facts(proof=PROVEN, asked_data={"packing": True}), facts(asked_data={"packing": True})],
        ConfigError,
    ),
    "proven": Case(
        [facts(proof=PROVEN), facts(proof=LEAKING)],
        "use",
        ["llama was compared with autograd on a small twin of 2 layers", "model.layers.0.q", "by 1.2e-07 of its size"],
        [facts(), facts(proof=WRONG)],
    ),
    "skip_unmatched": Case(
        [facts(quantization=SKIPS)],
        "refuse",
        ["quantization.skip: 'nix*' matches no weight", "such as embed"],
        [
            facts(quantization={**SKIPS, "skip": ["q", "n*"]}),
            facts(quantization={**SKIPS, "skip": ["norm"]}),  # stays what it is anyway
            facts(quantization={**SKIPS, "load_in_8bit": False}),
            facts(quantization=SKIPS, parameters=()),  # not known yet
        ],
        ConfigError,
    ),
    "trainable_unmatched": Case(
        [trainable("nix*"), trainable("*", "nix"), trainable("layers.0.q.")],
        "refuse",
        ["training.trainable: '", "matches no weight of this model", "* stands for anything"],
        [trainable("*"), trainable("norm"), replace(trainable("nix"), parameters=()), facts()],
        ConfigError,
    ),
    "trainable_held": Case(
        [trainable("q", quantization=BNB), trainable("*norm", "q", quantization=BNB)],
        "refuse",
        ["'q' matches only weights that bitsandbytes holds"],
        [trainable("*", quantization=BNB), trainable("norm", quantization=BNB), trainable("q")],
        ConfigError,
    ),
    "token_outside_the_vocabulary": Case(
        [with_data(largest_token=320), with_data(largest_token=320, largest_known=320)],
        "refuse",
        ["hold token 320, but the model's embedding only 320 rows", "tokenizer that belongs to the model"],
        [facts(), with_data(largest_known=320), facts(model=replace(MODEL, vocab_size=None))],
        ConfigError,
    ),
    "tokenizer_outside_the_vocabulary": Case(
        [with_data(largest_known=320)],
        "use",
        ["knows tokens up to 320", "has 320 rows", "the data use none of the others"],
        [facts(), facts(model=replace(MODEL, vocab_size=None)), with_data(largest_known=318, largest_token=318)],
    ),
    "nothing_to_group": Case(
        [facts(asked_data={"group_by_length": True})],
        "use",
        ["batch_size is 1", "nothing is padded", "data.packing=true"],
        [facts(asked_data={"group_by_length": True}, training={"batch_size": 2}), facts()],
    ),
    "warm_up": Case(
        [facts(training={"warmup_steps": 10}), facts(training={"warmup_steps": 11})],
        "refuse",
        ["but the run has only 10 steps", "Lower training.warmup_steps"],
        [facts(training={"warmup_steps": 9}), facts(training={"warmup_steps": 10}, data=DataFacts())],
        ConfigError,
    ),
    "nothing_measured": Case(
        [evaluated(0, early_stopping_patience=2), evaluated(0, load_best_model=True)],
        "refuse",
        ["look at eval losses", "leave no example to evaluate on"],
        [evaluated(0), evaluated(4, early_stopping_patience=2), evaluated(None, load_best_model=True)],
        ConfigError,
    ),
    "patience_too_long": Case(
        [evaluated(3, early_stopping_patience=3), evaluated(1, early_stopping_patience=1)],
        "use",
        ["evaluation(s) after a step", "it can't end early", "training.eval_every_steps"],
        [evaluated(3, early_stopping_patience=2), evaluated(3), evaluated(None, early_stopping_patience=9)],
    ),
    "one_to_choose": Case(
        [evaluated(1, load_best_model=True)],
        "use",
        ["nothing to choose from", "training.eval_every_steps"],
        [evaluated(2, load_best_model=True), evaluated(1)],
    ),
    "more_processes_than_micro_batches": Case(
        [facts(num_processes=4, training={"gradient_accumulation_steps": 3}), facts(num_processes=9)],
        "refuse",
        ["processes, but only", "in a step to deal out", "Raise training.gradient_accumulation_steps to"],
        [
            facts(num_processes=4, training={"gradient_accumulation_steps": 4}),
            facts(num_processes=8),
            facts(training={"gradient_accumulation_steps": 1}),
        ],
        ConfigError,
    ),
    "order_of_sums": Case(
        [facts(num_processes=2), facts(num_processes=4)],
        "use",
        ["in an order of its own", "up to 1 %", "distributed.sum_blocks=2, 4, ..."],
        [
            facts(),
            facts(num_processes=2, optimizer={"type": "adamw"}),
            facts(num_processes=2, distributed={"sum_blocks": 2}),
        ],
    ),
    "more_blocks_than_micro_batches": Case(
        [facts(distributed={"sum_blocks": 4}, training={"gradient_accumulation_steps": 3})],
        "refuse",
        ["distributed.sum_blocks=4 divides", "only 3", "raise training.gradient_accumulation_steps"],
        [facts(distributed={"sum_blocks": 4}, training={"gradient_accumulation_steps": 4})],
        ConfigError,
    ),
    "blocks_of_several_processes": Case(
        [facts(distributed={"sum_blocks": 4}, num_processes=3), facts(distributed={"sum_blocks": 2}, num_processes=4)],
        "refuse",
        ["can't be dealt out to", "a half or a quarter", "distributed.sum_blocks=1"],
        [facts(distributed={"sum_blocks": 4}, num_processes=2), facts(num_processes=3)],
        ConfigError,
    ),
    "frozen_layers": Case(
        [facts(quantization=BNB, optimizer={"type": "adamw"})],
        "use",
        ["they are frozen, AdamW trains the rest", "quantization.backend=native trains all weights"],
        [
            facts(optimizer={"type": "adamw"}),
            facts(quantization={"load_in_8bit": True}, optimizer={"type": "adamw"}),
            facts(quantization=BNB),
        ],
    ),
    "frozen_for_the_optimizer": Case(
        [
            facts(quantization=BNB, optimizer={"type": kind})
            for kind in ("galore", "sophia", "apollo", "apollo_mini", "scale")
        ],
        "fall back to adamw",
        ["matrices that optimizer.type=", "they are frozen", "quantization.backend=native trains all weights"],
        [
            facts(quantization=BNB, optimizer={"type": "adamw"}),
            facts(quantization={"load_in_8bit": True}),
            facts(quantization={**BNB, "load_in_8bit": False}),
        ],
    ),
    "rounded_to_nearest": Case(
        [facts(quantization={"load_in_8bit": True, "rounding": "nearest"})],
        "use",
        ["loses every step", "quantization.rounding=stochastic"],
        [facts(quantization={"load_in_8bit": True}), facts(quantization={"rounding": "nearest"})],
    ),
    "nothing_projected": Case(
        [facts(routes=RouteFacts(1.0)), facts(routes=RouteFacts(1.0), optimizer={"type": "apollo"})],
        "fall back to adamw",
        ["No matrix has both sides above the rank", "Lower the rank"],
        [
            facts(routes=RouteFacts(0.9, 1)),
            facts(routes=RouteFacts(1.0), optimizer={"type": "scale"}),
            facts(routes=RouteFacts(1.0), quantization=BNB),
            facts(routes=None),
        ],
    ),
    "nothing_folded": Case(
        [facts(routes=RouteFacts(1.0), quantization=LATE), facts(routes=RouteFacts(0.4, 2, 2), quantization=LATE)],
        "fall back to step",
        ["quantization.fold: refresh has nothing to keep"],
        [
            facts(routes=RouteFacts(0.4, 2, 2, 1), quantization=LATE),
            facts(routes=RouteFacts(1.0), quantization={**LATE, "fold": "step"}),
            facts(routes=RouteFacts(1.0), quantization={"fold": "refresh"}),
        ],
    ),
    "nothing_fast": Case(
        [facts(routes=RouteFacts(0.4, 2, 0), optimizer={"galore": {"fast_path": "always"}})],
        "fall back to full gradients",
        ["No matrix is large enough for optimizer.galore.fast_path"],
        [
            facts(routes=RouteFacts(0.4, 2, 1), optimizer={"galore": {"fast_path": "always"}}),
            facts(routes=RouteFacts(0.4, 2, 0)),
            facts(routes=RouteFacts(0.4, 2, 0), optimizer={"type": "adamw", "galore": {"fast_path": "always"}}),
            facts(routes=RouteFacts(1.0, 0, 0), optimizer={"galore": {"fast_path": "always"}}),
        ],
    ),
    "clip_outsized": Case(
        [clipping("model", MOST), clipping("model", RouteFacts(1.0), quantization=BNB)],
        "refuse",
        ["% of all gradients until their norm is known", "Lower optimizer.galore.rank", "training.clip_by=layer"],
        [
            clipping("model", FEW),
            clipping("auto", MOST),
            clipping("layer", MOST),
            facts(training={"clip_by": "model"}, routes=MOST),
        ],
        ConfigError,
    ),
    "clip_by_layer_as_asked": Case(
        [clipping("layer", FEW), clipping("layer", MOST, optimizer={"type": "adamw"})],
        "use",
        ["clipped to 0.5 by itself", "before the norm over all of them is known"],
        [clipping("auto", MOST), clipping("model", FEW), facts(training={"clip_by": "layer"})],
    ),
    "clip_by_layer": Case(
        [clipping("auto", MOST), clipping("auto", FEW, optimizer={"type": "adamw"})],
        "fall back to layer",
        ["clipped to 0.5 by itself", "too few gradients are projected"],
        [clipping("auto", FEW), clipping("layer", MOST), facts(routes=MOST)],
    ),
    "clip_by_model": Case(
        [clipping("auto", FEW), clipping("model", FEW)],
        "use",
        ["over the whole model is clipped to 0.5", "full gradients are formed"],
        [clipping("auto", MOST), clipping("layer", FEW), facts()],
    ),
    "streams": Case(
        [facts(memory=STREAMS), facts(memory=replace(STREAMS, limit_bytes=None))],
        "use",
        ["2 of 4 layers live in host memory (1.00 GiB)."],
        [facts(), facts(memory=replace(STREAMS, streamed="")), facts(memory=TOO_MUCH)],
    ),
    "host_too_small": Case(
        [facts(memory=replace(STREAMS, host_excess_bytes=3 * GIB // 2))],
        "refuse",
        ["is 1.50 GiB more than memory.host_limit", "memory.placement=disk", "quantization.enabled=true"],
        [facts(), facts(memory=STREAMS), facts(memory=None)],
        EnvironmentProblem,
    ),
    "wears_the_disk": Case(
        [
            facts(memory=replace(STREAMS, disk_written_bytes=1_200_000_000)),
            facts(memory=replace(STREAMS, disk_written_bytes=1_200_000_000), data=DataFacts()),
        ],
        "use",
        ["Each step writes 1.2 GB", "150 to 600 TB", "memory.placement=host writes nothing"],
        [facts(), facts(memory=STREAMS), facts(memory=None)],
    ),
    "full_gradients_apart": Case(
        [facts(memory=APART), facts(memory=replace(APART, needed_bytes=GIB))],
        "use",
        ["engine.full_gradients: auto", "one matrix after the other"],
        [
            facts(),
            facts(memory=replace(APART, full_gradients="layer")),
            Facts(asked(engine={"full_gradients": "matrix"}), memory=APART),
        ],
    ),
    "does_not_fit": Case(
        [on_oom("stop"), on_oom("stop", replace(TOO_MUCH, needed_bytes=4 * GIB))],
        "use",
        ["GiB for tensors", "more than there is", "stop in the probe step", "plan --fit finds settings"],
        [
            on_oom("adapt"),
            on_oom("stop", None),
            on_oom("stop", replace(TOO_MUCH, limit_bytes=None)),
            on_oom("stop", replace(TOO_MUCH, needed_bytes=3 * GIB)),  # to the byte
        ],
    ),
    "does_not_fit_yet": Case(
        [on_oom("adapt")],
        "use",
        ["to need 3.50 GiB for tensors, 512 MiB more than there is", "adapt will make micro-batches smaller", "--fit"],
        [
            on_oom("stop"),
            on_oom("adapt", None),
            on_oom("adapt", replace(TOO_MUCH, reserve_bytes=GIB // 2)),
        ],
    ),
}
ROWS = {rule.key: rule for rule in RULES}


def ids(which: str) -> list[Any]:
    return [
        pytest.param(key, known, id=f"{key}-{number}")
        for key, case in CASES.items()
        for number, known in enumerate(getattr(case, which))
    ]


def test_every_row_of_the_table_has_a_case() -> None:
    assert list(ROWS) == [rule.key for rule in RULES] == list(CASES), "keys are unique, and in the table's order"


@pytest.mark.parametrize(("key", "known"), ids("fires"))
def test_the_rule_speaks(key: str, known: Facts) -> None:
    case, rule = CASES[key], ROWS[key]
    assert describe(rule.verdict, known) == case.verdict
    if case.error is not None:
        with pytest.raises(case.error) as caught:
            decide(RULES, known)
        assert type(caught.value) is case.error and caught.value.exit_code == 2
        text = str(caught.value)
        assert caught.value.remedy
    else:
        (said,) = [decided for decided in decide(RULES, known) if decided.key == key]
        assert said.verdict == case.verdict
        text = said.sentence()
    assert all(word in text for word in case.words), text
    assert "{" not in text and "None" not in text


@pytest.mark.parametrize(("key", "known"), ids("quiet"))
def test_one_step_away_it_does_not(key: str, known: Facts) -> None:
    assert not ROWS[key].applies(known)


def test_what_a_run_writes_to_disk_is_said_if_its_steps_are_known() -> None:
    known = facts(memory=replace(STREAMS, disk_written_bytes=2_500_000_000), data=replace(DATA, num_steps=4000))
    assert known.disk_writes == "2.5 GB, 10 TB in this run"
    assert replace(known, data=DataFacts()).disk_writes == "2.5 GB"


@pytest.mark.parametrize("kind", ["galore", "adamw", "sophia", "apollo", "apollo_mini", "scale"])
@pytest.mark.parametrize("known", [Facts(RunConfig()), facts(), facts(device=CPU)], ids=["nothing", "gpu", "cpu"])
def test_nothing_is_said_of_what_is_as_it_should_be(known: Facts, kind: str) -> None:
    config = asked(optimizer={"type": kind})
    assert decide(RULES, replace(known, config=config)) == ()
    assert optimizer(replace(known, config=config)) == kind


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        (dtype("auto", CPU), torch.float32),
        (dtype("auto", AMPERE), torch.bfloat16),
        (dtype("auto", TURING), torch.float16),
        (dtype("auto", PASCAL), torch.float16),
        (dtype("bf16", CPU), torch.bfloat16),
        (dtype("fp32", TURING), torch.float32),
    ],
)
def test_the_table_settles_the_precision(known: Facts, chosen: torch.dtype) -> None:
    assert compute_dtype(known) == chosen


@pytest.mark.parametrize(
    ("known", "by"),
    [
        (facts(), None),
        (clipping("auto", FEW), "model"),
        (clipping("auto", MOST), "layer"),
        (clipping("layer", FEW), "layer"),
        (clipping("model", FEW), "model"),
    ],
)
def test_the_table_settles_what_is_clipped_by(known: Facts, by: str | None) -> None:
    assert settled(RULES, "clip_by", known) == by


def test_all_refusals_come_at_once() -> None:
    known = facts(
        training={"max_length": 513, "warmup_steps": 11, "compute_dtype": "bf16"},
        device=TURING,
        quantization=BNB,
        bitsandbytes=BitsandbytesFacts(),
    )
    with pytest.raises(UserError) as caught:
        decide(RULES, known)
    assert type(caught.value) is UserError, "they are of different classes"
    assert caught.value.cause.startswith("4 problems with this run:")
    for part in ("513", "10 steps", "RTX 2080", "not installed", "pip install", "training.max_length=512"):
        assert part in str(caught.value)
    same = facts(training={"max_length": 513, "warmup_steps": 11})
    with pytest.raises(ConfigError, match="2 problems with this run"):
        decide(RULES, same)


def test_a_table_is_evaluated_in_its_order_and_texts_are_filled_in() -> None:
    table = (
        Rule("one", lambda f: True, Use("thing", "a"), "On {f.device.place}.", "Do."),
        Rule("two", lambda f: f.device.is_cpu, FallBack("thing", "b"), "Never."),
        Rule("three", lambda f: True, FallBack("other", "c"), "Yes."),
        Rule("four", lambda f: f.device.is_cpu, Refuse(), "No."),
    )
    said = decide(table, facts())
    assert [(row.key, row.verdict, row.sentence()) for row in said] == [
        ("one", "use", "On cuda:0. Do."),
        ("three", "fall back to c", "Yes."),
    ]
    assert [settled(table, name, facts()) for name in ("thing", "other", "third")] == ["a", "c", None]
    assert [Decided(**json.loads(json.dumps(row.to_json()))) for row in said] == list(said)
    with pytest.raises(ConfigError, match=r"No\."):
        decide(table, facts(device=CPU))


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("model.layers.0.self_attn.q_prj.weight", "model.layers.0.self_attn.q_proj.weight? "),
        ("model.layer.0*", "model.layers.0.*? "),
        ("model.layers.0", "model.layers.0.*? "),
        ("lm_heads.weight", "lm_head.weight? "),
        ("transformer.wte", ""),
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_with_what_was_meant(pattern: str, meant: str) -> None:
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")
    known = replace(trainable(pattern), parameters=tuple(Param(name, (8, 8)) for name in names))
    assert known.nearest_trainable == (f"Did you mean {meant}" if meant else "")


def test_what_falls_back_to_adamw_is_said_of_the_weights_that_are_trained() -> None:
    (said,) = decide(RULES, replace(trainable("norm"), routes=RouteFacts(1.0)))
    assert "No matrix of training.trainable has both sides above the rank" in said.reason
