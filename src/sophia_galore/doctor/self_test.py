"""The checks that train: tiny runs which have to agree with each other, with the plan and with their limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sophia_galore.config.size import bytes_in_words
from sophia_galore.doctor.bits import tensors_in
from sophia_galore.doctor.findings import Check, Outcome, well, wrong
from sophia_galore.doctor.subject import Subject
from sophia_galore.doctor.tiny_model import QUESTION, tiny_config
from sophia_galore.doctor.trials import KILLED_AFTER, NUM_STEPS, SAVED_AFTER, Trial
from sophia_galore.engine.proof import TOLERANCE, prove
from sophia_galore.errors import OutOfMemory
from sophia_galore.memory.budget import outside_bytes
from sophia_galore.numerics.noise import Noise
from sophia_galore.records import files
from sophia_galore.records.files import checkpoint_folder
from sophia_galore.records.run import Answers
from sophia_galore.records.schema import read_object
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.weight import Weight

REPORT = "Please report it, with the file that --output writes: this is a fault of the program or of a library."
_OTHER_VERSIONS = "Install the versions that are tested, which constraints.txt lists. " + REPORT

# An update of an eighth of a step of the format: rounded to nearest, it is lost.
_SHARE = 0.125
_SHAPE = (256, 128)
# Six standard deviations of the mean of so many draws with this probability.
_SHARE_TOLERANCE = 6 * (_SHARE * (1 - _SHARE) / (_SHAPE[0] * _SHAPE[1])) ** 0.5
_NOISE = Noise.of(0, "doctor", "rounding")

# How far the fall of the loss may be from that with fp32 weights, as a share of it; worst seen 0.02. Where updates are
# rounded to nearest it is off by 0.11 in bf16 and 0.77 in int8, at the rate and with the steps of these runs.
_FALL_TOLERANCE = 0.07
# By so much may a prediction be off, as in the warning of `train`; worst seen 0 on a CPU.
_FAR_OFF = 0.05
# What libraries such as cuBLAS may take on a GPU beside tensors that are ours.
_LIBRARIES_BYTES = 96 * 2**20
_ROOM_BYTES = 256 * 2**20
_NO_ROOM_BYTES = 8 * 2**20
_LIMITED = ("memory.predict=false", "memory.track_steps=0")


def gradients(subject: Subject) -> Outcome:
    """Compare the engine's gradients with those of plain autograd, in float32 on the CPU."""
    proof = prove(tiny_config())
    if problem := proof.problem or proof.packing_problem:
        return wrong(problem, _OTHER_VERSIONS, figures={"largest_difference": proof.difference})
    return well(
        f"The gradients of a twin with {proof.num_layers} layers are those of plain autograd to {proof.difference:.1e} "
        f"of their norms (allowed: {TOLERANCE:.0e}).",
        figures={"largest_difference": proof.difference},
    )


def rounding(subject: Subject) -> Outcome:
    """Write an update of an eighth of a step many times: on average it has to arrive."""
    shares = {"bf16": _moved_share_bf16(subject.device), "int8": _moved_share_int8(subject.device)}
    figures = {f"{name}_share": round(share, 5) for name, share in shares.items()}
    said = ", ".join(f"{share:.4f} in {name}" for name, share in shares.items())
    if any(abs(share - _SHARE) > _SHARE_TOLERANCE for share in shares.values()):
        return wrong(
            f"Stochastic rounding has another mean than it should: of an update of {_SHARE} steps of the format {said} "
            "arrive on average, so that small updates are lost or too large.",
            REPORT,
            figures=figures,
        )
    return well(
        f"Stochastic rounding has the right mean: of an update of {_SHARE} steps, {said} arrive.", figures=figures
    )


def noise(subject: Subject) -> Outcome:
    """Compare the device's noise with that of the definition, computed on the CPU."""
    like = torch.empty(_SHAPE)
    expected = _NOISE.integers(like)
    found = _NOISE.integers(like.to(subject.device)).cpu()
    values = expected.double()
    # Odd numbers in (-2^15, 2^15), uniform: mean 0, and a standard deviation of 2^15 / sqrt(3).
    spread = float(values.std()) * 3**0.5 / 2**15
    centre = abs(float(values.mean())) / 2**15
    num_distinct = int(expected.unique().numel())
    if not torch.equal(found, expected):
        return wrong(
            f"The noise for rounding differs between {subject.device} and the CPU in "
            f"{int((found != expected).sum())} of {expected.numel()} numbers.",
            REPORT,
        )
    if abs(spread - 1) > 0.02 or centre > 0.02 or num_distinct < 2**13:
        return wrong(
            f"The noise for rounding is not uniform: {num_distinct} different numbers of {expected.numel()}, spread "
            f"{spread:.3f} instead of 1, mean {centre:.3f} instead of 0.",
            REPORT,
        )
    return well(f"The noise for rounding is uniform, and on {subject.device} it is what its definition says.")


def trains(subject: Subject) -> Outcome:
    """Train with the default optimizer and weights in float32."""
    plain = subject.trials.run("plain")
    if problem := _unmoved(_weights(subject.trials.model), _weights(checkpoint_folder(plain.folder, NUM_STEPS))):
        return wrong(f"After {NUM_STEPS} steps {problem}.", _OTHER_VERSIONS, figures=_losses(plain))
    if not plain.last_loss < plain.first_loss:
        return wrong(
            f"{NUM_STEPS} steps of training did not lower the loss on held-out examples: {_fall(plain)}.",
            _OTHER_VERSIONS,
            figures=_losses(plain),
        )
    return well(
        f"{NUM_STEPS} steps of GaLore trained every weight; the loss on held-out examples went {_fall(plain)}.",
        figures=_losses(plain),
    )


def repeats(subject: Subject) -> Outcome:
    """Train the same once more."""
    plain, again = subject.trials.run("plain"), subject.trials.run("again")
    if difference := plain.bits.difference(again.bits):
        return wrong(
            f"Two runs of the same configuration are not the same to the bit: {difference}.",
            "Results can't be repeated or resumed exactly here. " + _OTHER_VERSIONS,
        )
    return well(f"Two runs of the same configuration are the same to the bit ({_num(plain)}).")


def plans(subject: Subject) -> Outcome:
    """Compare the predicted peak with the measured one."""
    memory = subject.trials.run("plain").result.memory
    predicted, allocated = memory.predicted_peak_bytes, memory.peak_allocated_bytes
    tracked = sum(memory.categories.values())
    figures = {
        "predicted_bytes": predicted,
        "tracked_bytes": tracked,
        "allocated_bytes": allocated,
        "reserved_bytes": memory.peak_reserved_bytes,
        "process_bytes": memory.peak_process_bytes,
    }
    if predicted is None or not tracked or allocated is None:
        return wrong("The memory of the run was not predicted, or not measured.", REPORT, figures=figures)
    off = predicted / tracked - 1
    said = f"{bytes_in_words(predicted)} were predicted, tensors took {bytes_in_words(tracked)} ({off:+.1%})"
    if subject.device.type == "cuda":
        said += f", the allocator gave {bytes_in_words(allocated)} and held {bytes_in_words(_or_0(memory))}"
    # On a GPU the allocator also counts what libraries take, and rounds each tensor up.
    beside = _LIBRARIES_BYTES if subject.device.type == "cuda" else 0
    if abs(off) > _FAR_OFF or allocated > predicted * (1 + _FAR_OFF) + beside:
        return wrong(
            f"The plan of memory is off: {said}.",
            "Leave more room than `plan` says, for instance with memory.reserve. " + REPORT,
            figures=figures,
        )
    return well(f"The plan of memory holds: {said}.", figures=figures)


def resumes(subject: Subject) -> Outcome:
    """Kill a run in a process of its own, and resume it here."""
    plain, resumed = subject.trials.run("plain"), subject.trials.resumed
    if difference := plain.bits.difference(resumed.bits):
        return wrong(
            f"A run that was killed after step {KILLED_AFTER} and resumed is not the same as one that was not: "
            f"{difference}.",
            "Do not rely on --resume here. " + REPORT,
        )
    return well(f"A run that was killed after step {KILLED_AFTER} and resumed ends with the same bits.")


def bf16_store(subject: Subject) -> Outcome:
    """Train weights that are stored in bf16."""
    return _stored(subject, "bf16", torch.bfloat16)


def int8_store(subject: Subject) -> Outcome:
    """Train weights that are stored in int8, with states of 8 bits."""
    return _stored(subject, "int8", torch.int8)


def streams_host(subject: Subject) -> Outcome:
    """Train weights and states that live in host memory."""
    return _streamed(subject, "host", "in host memory")


def streams_disk(subject: Subject) -> Outcome:
    """Train weights and states that live in files."""
    return _streamed(subject, "disk", "in files on the disk of this folder")


def limits(subject: Subject) -> Outcome:
    """Train under a limit of memory that is just enough, and under one that is not."""
    trials = subject.trials
    plain = trials.run("plain")
    enough, too_little, outside = _limits(subject, plain)
    limited = trials.train("limited", *_LIMITED, f"memory.limit={enough}")
    taken = _or_0(limited.result.memory)
    figures = {"limit_bytes": enough, "too_little_bytes": too_little, "taken_bytes": taken, "outside_bytes": outside}
    if taken > enough - outside:
        return wrong(
            f"A run under memory.limit of {bytes_in_words(enough)} took {bytes_in_words(taken)}, which is more than "
            f"the {bytes_in_words(enough - outside)} that are for tensors.",
            "Do not rely on memory.limit here. " + REPORT,
            figures=figures,
        )
    with suppress(OutOfMemory):
        trials.train("refused", *_LIMITED, f"memory.limit={too_little}")
        return wrong(
            f"memory.limit is not respected: a run that needs more finished under a limit of "
            f"{bytes_in_words(too_little)}.",
            "Do not rely on memory.limit here. " + REPORT,
            figures=figures,
        )
    if difference := plain.bits.difference(limited.bits):
        return wrong(f"A limit of memory changes numbers: {difference}.", REPORT, figures=figures)
    return well(
        f"memory.limit is respected: {enough:,} bytes are enough and change no bit; with {too_little:,} the run is "
        "refused.",
        figures=figures,
    )


def answers(subject: Subject) -> Outcome:
    """Compare the run's own answers with what transformers makes of the final model."""
    plain = subject.trials.run("plain")
    given = Answers.read(plain.folder / files.ANSWERS)
    before, after = given.before.get(QUESTION, ""), given.after.get(QUESTION, "")
    if not before or not after:
        when = "after" if before else "before"
        return wrong(f"The model gave no answer {when} training.", _OTHER_VERSIONS)
    theirs, is_finite = _answer_of_transformers(plain.folder)
    if not is_finite:
        return wrong("transformers opens the final model, but its logits are not finite.", _OTHER_VERSIONS)
    # On a GPU the run computes in another precision than transformers does here, on the CPU.
    if subject.device.type == "cpu" and theirs != after:
        return wrong(
            f"transformers opens the final model and answers {theirs!r}, but the run itself answered {after!r}.",
            _OTHER_VERSIONS,
        )
    if not theirs:
        return wrong("transformers opens the final model, but it gives no answer.", _OTHER_VERSIONS)
    same = "answers the same" if theirs == after else "answers as well"
    return well(f"The model answers before and after training; transformers opens the final model, and it {same}.")


CHECKS = (
    Check("gradients", "Gradients", gradients, needs_device=False),
    Check("rounding", "Rounding of small updates", rounding),
    Check("noise", "Noise for rounding", noise),
    Check("trains", "A run", trains),
    Check("repeats", "The same run again", repeats),
    Check("plans", "Planned and measured memory", plans),
    Check("resumes", "Killed and resumed", resumes),
    Check("bf16-store", "Weights in bf16", bf16_store),
    Check("int8-store", "Weights in int8", int8_store),
    Check("streams-host", "Layers in host memory", streams_host),
    Check("streams-disk", "Layers on disk", streams_disk),
    Check("limits", "Limit of memory", limits),
    Check("answers", "Answers", answers),
)
"""In this order: what a run needs first, then the run, then what is compared with it."""


def _moved_share_bf16(device: torch.device) -> float:
    """Return by how many steps of bf16 an update of `_SHARE` steps moves a weight on average."""
    step = 2.0**-7  # of the numbers from 1 to 2
    return _moved_share(PlainWeight(torch.ones(_SHAPE, dtype=torch.bfloat16, device=device)), step)


def _moved_share_int8(device: torch.device) -> float:
    """Return the same for int8; all weights of a block are equal, so that its scale has room for the update."""
    weight = quantise(torch.ones(_SHAPE, device=device), Int8Format())
    return _moved_share(weight, float(weight.scales[0, 0]))


def _moved_share(weight: Weight, step: float) -> float:
    before = weight.values(torch.float32).clone()
    weight.write(before + _SHARE * step, _NOISE)
    return float((weight.values(torch.float32) - before).double().mean()) / step


def _unmoved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> str:
    """Return a clause about weights that did not change; empty: all did."""
    same = sorted(name for name in before if name in after and torch.equal(before[name], after[name]))
    return f"{len(same)} of {len(before)} weights did not change, the first is {same[0]}" if same else ""


def _weights(folder: Path, *, only_matrices: bool = False) -> dict[str, torch.Tensor]:
    found = {name.partition("/")[2]: tensor for name, tensor in tensors_in(folder) if name.startswith("model/")}
    if not only_matrices:
        return found
    # Scales of eight bits stay as long as their blocks fit.
    return {name: tensor for name, tensor in found.items() if tensor.ndim == 2 and not name.endswith(".scales")}


def _stored(subject: Subject, name: str, dtype: torch.dtype) -> Outcome:
    """Train with another format of the weights, and compare with the run in float32."""
    plain, trial = subject.trials.run("plain"), subject.trials.run(name)
    figures = {**_losses(trial), "fp32_last_loss": plain.last_loss}
    # Of matrices: single numbers of norms may well be rounded back to where they were.
    earlier, last = (
        _weights(checkpoint_folder(trial.folder, step), only_matrices=True) for step in (SAVED_AFTER, NUM_STEPS)
    )
    if not last or earlier.keys() != last.keys():
        return wrong(f"The checkpoints of a run with weights in {name} have not the same matrices.", REPORT)
    others = [key for key, tensor in last.items() if tensor.dtype != dtype]
    if others:
        return wrong(
            f"{len(others)} matrices are not stored in {name}, the first is {others[0]} in {last[others[0]].dtype}.",
            REPORT,
            figures=figures,
        )
    if problem := _unmoved(earlier, last):
        return wrong(f"From step {SAVED_AFTER} to {NUM_STEPS}, {problem} in {name}.", REPORT, figures=figures)
    share = (trial.first_loss - trial.last_loss) / (plain.first_loss - plain.last_loss)
    said = f"the loss went {_fall(trial)} ({share:.2f} of the fall with fp32)"
    if not abs(share - 1) <= _FALL_TOLERANCE:
        return wrong(
            f"Weights in {name} do not learn what weights in fp32 do: {said}.",
            "Use model.store=fp32 without quantization. " + REPORT,
            figures=figures,
        )
    return well(f"Weights in {name} are trained: {said}.", figures=figures)


def _streamed(subject: Subject, name: str, place: str) -> Outcome:
    """Train with layers that live elsewhere, and compare with the run whose layers stay on the device."""
    plain, trial = subject.trials.run("plain"), subject.trials.run(name)
    placed = read_object(trial.folder / files.PLAN).get("placements") or {}
    if set(placed.values()) != {name}:
        return wrong(f"The run that was asked to keep its layers {place} did not: {placed or 'they stayed'}.", REPORT)
    if difference := plain.bits.difference(trial.bits):
        return wrong(
            f"Layers that live {place} give other results than layers on the device: {difference}.",
            f"Do not use memory.placement={name} here. " + REPORT,
        )
    return well(f"Layers that live {place} give the same bits as layers on the device.")


def _limits(subject: Subject, plain: Trial) -> tuple[int, int, int]:
    """Return a limit that is enough, one that is not, and the bytes of both that are not for tensors."""
    if subject.device.type != "cuda":
        peak = plain.result.memory.peak_allocated_bytes or 0
        return peak, int(0.9 * peak), 0
    torch.cuda.empty_cache()
    outside = outside_bytes(subject.device, None)
    return outside + _or_0(plain.result.memory) + _ROOM_BYTES, outside + _NO_ROOM_BYTES, outside


def _or_0(memory: Any) -> int:
    return int(memory.peak_reserved_bytes or 0)


def _answer_of_transformers(folder: Path) -> tuple[str, bool]:
    """Return what transformers answers with a run's final model on the CPU, and whether its logits are finite."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with _without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = model(**asked).logits
        made = model.generate(**asked, do_sample=False, max_new_tokens=8)
    text = tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip(), bool(logits.isfinite().all())


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _losses(trial: Trial) -> dict[str, float]:
    return {"first_loss": trial.first_loss, "last_loss": trial.last_loss}


def _fall(trial: Trial) -> str:
    return f"from {trial.first_loss:.4f} to {trial.last_loss:.4f}"


def _num(trial: Trial) -> str:
    return f"{len(trial.bits.tensors)} tensors"
