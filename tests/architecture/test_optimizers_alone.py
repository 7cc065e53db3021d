"""What `pip install sophia-galore` brings is enough for the optimizers; the command says what it needs beside it.

Finders that know torch, NumPy and safetensors only stand for an environment in which nothing else is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sophia_galore
from sophia_galore.cli import main as command
from sophia_galore.errors import EnvironmentProblem, lacks_package

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(sophia_galore.__file__).parent

_ALONE = r"""
import importlib.metadata as metadata
import re
import sys

# torch's own requirements, and what those require.
found, waiting = set(), ["torch", "numpy", "safetensors"]
while waiting:
    name = waiting.pop()
    if name in found:
        continue
    found.add(name)
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    waiting += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
dists = metadata.packages_distributions()
allowed = set(sys.stdlib_module_names) | {"sophia_galore"}
allowed |= {top for top, names in dists.items() if {name.replace("_", "-") for name in names}
            & {name.replace("_", "-") for name in found}}


class Only:
    # One of Python's finders, for what is allowed.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        # The second is Python's own, by a name that depends on the platform.
        if name.partition(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Only, sys.meta_path)
"""

_TRAINS = """
import io
import torch
import sophia_galore
from sophia_galore import Apollo, GaLore, Sophia, attach, watch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(40, 24), torch.nn.Linear(24, 40))


x = torch.arange(32).view(2, 16)
makes = [
    lambda p, **s: GaLore(p, lr=1e-2, rank=6, **s),
    lambda p, **s: GaLore(p, lr=1e-2, rank=6, subspace="svd", residual="fira", projection_bits=4, **s),
    lambda p, **s: GaLore(p, lr=1e-2, rank=6, rule="sophia", **s),
    lambda p, **s: GaLore(p, lr=1e-2, rank=6, rule="muon", **s),
    lambda p, **s: GaLore(p, lr=1e-2, rank=6, rule="adafactor", adaptive_gap=True, **s),
    lambda p, **s: Apollo(p, lr=1e-2, rank=6, **s),
    lambda p, **s: Apollo(p, lr=1e-2, mini=True, **s),
    lambda p, **s: Sophia(p, lr=1e-2, **s),
]
for make in makes:
    for bits in (32, 16, 8):
        model, other = net(), net()
        optimizer, fresh = make(model.named_parameters(), state_bits=bits), make(other.parameters(), state_bits=bits)
        if optimizer.curved_parameters():
            watch(optimizer, model)
        elif bits == 8:
            attach(optimizer, model)
        for _ in range(2):
            torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        make(model.named_parameters(), state_bits=bits).load_state_dict(torch.load(file, weights_only=True))
foreign = {name.partition(".")[0] for name in sys.modules} - allowed
print("done", sorted(name for name in foreign if not name.startswith("_")))
"""


def alone(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ALONE + code],
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_optimizer_trains_with_torch_numpy_and_safetensors_alone() -> None:
    done = alone(_TRAINS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("done")
    for name in ("transformers", "pydantic", "typer", "rich", "accelerate", "datasets", "yaml", "huggingface_hub"):
        assert f"'{name}'" not in done.stdout


@pytest.mark.parametrize(
    "start", ["import sophia_galore.__main__", "from sophia_galore.cli.start import entry; entry()"]
)
@pytest.mark.parametrize("words", [[], ["--version"], ["train"]])
def test_the_command_says_what_to_install(start: str, words: list[str]) -> None:
    done = alone(f"sys.argv[1:] = {words!r}\n{start}")
    assert done.returncode == 2 and not done.stdout
    expected = r'Error: The package \w+ is not installed\. Install it with: pip install "sophia-galore\[train\]"\.\n'
    assert re.fullmatch(expected, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("package", "extra"), [("datasets", "train"), ("matplotlib.figure", "train"), ("requests", "modelscope")]
)
def test_a_package_that_is_missed_later(package: str, extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = command._explain(ModuleNotFoundError(f"No module named {package!r}", name=package))
    name = package.partition(".")[0]
    assert code == EnvironmentProblem.exit_code
    said = " ".join(capsys.readouterr().err.split())
    assert f'The package {name} is not installed. Install it with: pip install "sophia-galore[{extra}]".' in said


def test_somebody_elses_missing_package_is_not_ours_to_name() -> None:
    assert lacks_package(ModuleNotFoundError("No module named 'einops'", name="einops")) is None
    assert lacks_package(ModuleNotFoundError("odd")) is None


def test_the_project_asks_for_what_it_imports() -> None:
    """Three packages for the optimizers; each extra that a message names exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [re.split(r"[<>=\[]", need)[0] for need in project["dependencies"]] == ["torch", "numpy", "safetensors"]
    named = {
        extra
        for path in SOURCE.rglob("*.py")
        for extra in re.findall(r"sophia-galore\[(\w+)\]", path.read_text(encoding="utf-8"))
    }
    assert named - {"train"} <= project["optional-dependencies"].keys() and "train" in project["optional-dependencies"]
    assert "sophia-galore[train]" in project["optional-dependencies"]["dev"]


def test_lower_bounds_are_those_that_were_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    tried = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    trl = [need for need in project["optional-dependencies"]["dev"] if need.startswith("trl")]
    for need in (*project["dependencies"], *project["optional-dependencies"]["train"], *trl):
        name, bound = need.split(",")[0].lower().split(">=")
        assert f"{tried.pop(name)}.0.0".startswith(f"{bound}."), need
    assert not tried
