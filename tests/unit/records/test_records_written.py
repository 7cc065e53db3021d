"""What a run writes fits the schemas to the last field, so that a schema says all that there is in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sophia_galore.records import files
from sophia_galore.records.memory import MemoryReport
from sophia_galore.records.metrics import Evaluation, Exported, TrainStep
from sophia_galore.records.report import Report
from sophia_galore.records.run import Answers, CheckpointManifest, Environment, PlanRecord, TrainerState
from sophia_galore.records.schema import Record
from unit.cli.tiny_run import command, make_world

SCHEMAS: dict[str, type[Record]] = {
    files.MEMORY_REPORT: MemoryReport,
    files.TRAINER_STATE: TrainerState,
    files.ENVIRONMENT: Environment,
    files.ANSWERS: Answers,
    files.REPORT_JSON: Report,
    f"checkpoint-2/{files.MANIFEST}": CheckpointManifest,
    f"checkpoint-2/{files.TRAINER_STATE}": TrainerState,
    f"checkpoint-2/{files.MEMORY_REPORT}": MemoryReport,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that writes all that it can, and its report."""
    world = make_world(tmp_path_factory.mktemp("world"))
    words = ["training.max_steps=2", "training.load_best_model=true", "training.eval_every_steps=1"]
    words += ["training.early_stopping_patience=9", "checkpoint.save_every_steps=2"]
    ended = world.train("run", *words, 'training.sample_questions=["What?"]', "training.sample_max_new_tokens=2")
    assert ended.code == 0, ended.err
    assert command("report", str(world.folder / "run")).code == 0
    return world.folder / "run"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_file_is_read_back_as_it_was_written(name: str, run: Path) -> None:
    written = json.loads((run / name).read_text(encoding="utf-8"))
    assert json.loads(json.dumps(SCHEMAS[name].read(run / name).to_json())) == written


def test_each_line_of_the_metrics_is_read_back_as_it_was_written(run: Path) -> None:
    lines = [json.loads(line) for line in (run / files.METRICS).read_text(encoding="utf-8").splitlines()]
    kinds = {"eval_loss": Evaluation, "exported_step": Exported, "loss": TrainStep}
    for line in lines:
        kind = next(kind for key, kind in kinds.items() if key in line)
        assert kind.of(line, "here").to_json() == line
    assert {key for key in kinds for line in lines if key in line} == set(kinds)


def test_the_plan_has_what_reports_show(run: Path) -> None:
    written = json.loads((run / files.PLAN).read_text(encoding="utf-8"))
    assert {field.alias or name for name, field in PlanRecord.model_fields.items()} <= set(written)
    assert PlanRecord.read(run / files.PLAN).num_steps == 2


def test_all_that_is_written_has_a_name(run: Path) -> None:
    listed = json.loads((run / files.WRITTEN).read_text(encoding="utf-8"))
    found = {path.name for path in run.iterdir() if not path.name.startswith("checkpoint-")}
    assert found - files.RUN_FILES - set(listed) == {"README.md"}
