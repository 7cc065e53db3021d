"""The numbers of a run and of several, against the same ones by hand."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev

import pytest

from made_runs import MIB, write_run
from sophia_galore.errors import UserError
from sophia_galore.report.comparison import compare_runs, read_runs
from sophia_galore.report.document import Table
from sophia_galore.report.numbers import group_by_name, run_numbers
from sophia_galore.report.run import Run, read_run
from sophia_galore.report.sections import build_document


def test_every_number_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", tokens=100, tokens_per_second=[10.0, 50.0, 50.0, 25.0])
    result = run_numbers(read_run(folder))
    assert result.to_json() == {
        "name": "a",
        "optimizer": "galore",
        "seed": 42,
        "eval_loss": [2.6, 2.4],
        "eval_loss_before": 3.1,
        "peak_allocated_bytes": 900 * MIB,
        "peak_reserved_bytes": 901 * MIB,
        "peak_process_bytes": 1800 * MIB,
        "seconds_per_epoch": 9.0,  # 10 + 2 + 2 + 4 seconds in two epochs
        "tokens_per_second": round(400 / 18, 3),
        "trained_fraction": 1.0,
        "state_bytes": 250 * MIB,
        "step": 4,
        "num_steps": 4,
        "finished": True,
        "failure": "",
        "tokens": 400,
        "ended_early": False,
        "exported_step": None,
        "exported_eval_loss": None,
        "waiting_share": None,
    }


def test_how_long_the_computation_waited_for_weights(tmp_path: Path) -> None:
    # 10, 2, 2 and 4 seconds: 1 + 1 + 2 of them; of the third step it is not known.
    folder = write_run(tmp_path / "a", tokens_per_second=[10.0, 50.0, 50.0, 25.0], waiting_shares=[0.1, 0.5, None, 0.5])
    run = read_run(folder)
    assert [line.waiting_share for line in run.metrics.train] == [0.1, 0.5, None, 0.5]
    assert run_numbers(run).waiting_share == 0.25
    assert run_numbers(read_run(write_run(tmp_path / "b", waiting_shares=[0.0] * 4))).waiting_share == 0.0


def test_the_column_of_waiting_is_there_if_a_run_streams(tmp_path: Path) -> None:
    still, streaming = (
        read_run(write_run(tmp_path / name, waiting_shares=shares))
        for name, shares in (("still", []), ("streaming", [0.125] * 4))
    )

    def tables(*runs: Run) -> list[Table]:
        sections = build_document(compare_runs(list(runs))).sections
        parts = [part for section in sections if section.heading == "Run by run" for part in section.parts]
        return [part for part in parts if isinstance(part, Table)]

    assert tables(still) == []
    (alone,), (mixed,) = tables(streaming), tables(still, streaming)
    assert alone.columns == mixed.columns and alone.columns[-1] == "waited for weights"
    assert [row[-1] for row in alone.rows] == ["12.5%"] and [row[-1] for row in mixed.rows] == ["-", "12.5%"]
    assert all(len(row) == len(mixed.columns) for row in mixed.rows)
    again = read_run(write_run(tmp_path / "again", seed=7), name="still")
    (seeds,) = tables(still, again)
    assert "waited for weights" not in seeds.columns


def test_a_run_that_is_under_way_has_the_numbers_so_far(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=[3.0], evals={0: 3.1}, finished=False)
    result = run_numbers(read_run(folder))
    assert (result.step, result.finished, result.eval_loss, result.eval_loss_before) == (1, False, [], 3.1)
    assert result.peak_allocated_bytes == 900 * MIB - 1  # of the records, as there is no memory report yet
    assert result.peak_process_bytes is None
    assert result.seconds_per_epoch == 4.0  # 2 seconds for half an epoch


def test_before_the_first_step_there_is_little(tmp_path: Path) -> None:
    result = run_numbers(read_run(write_run(tmp_path / "a", losses=[], evals={}, finished=False)))
    assert (result.step, result.eval_loss, result.seconds_per_epoch, result.tokens_per_second) == (0, [], None, None)


def test_of_several_evaluations_in_an_epoch_the_last_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", evals={1: 2.9, 2: 2.8, 3: 2.7})
    assert run_numbers(read_run(folder)).eval_loss == [2.8, 2.7]
    assert run_numbers(read_run(folder)).eval_loss_before is None


def test_means_spreads_and_differences_within_a_seed(tmp_path: Path) -> None:
    ends = {"first": (2.4, 3.4), "second": (2.5, 3.3), "third": (9.0,)}
    runs = [
        read_run(write_run(tmp_path / f"{name}{seed}", seed=seed, evals={2: end + 1, 4: end}), name=name)
        for name, values in ends.items()
        for seed, end in enumerate(values)
    ]
    first, second, third = group_by_name([run_numbers(run) for run in runs])
    assert first.seeds == [0, 1] and third.seeds == [0]
    assert first.final_eval_loss is not None and first.final_eval_loss.mean == pytest.approx(2.9, rel=1e-15)
    assert first.final_eval_loss.deviation == stdev([2.4, 3.4])
    assert first.difference is None
    assert second.difference is not None and second.difference.mean == pytest.approx(0.0, abs=1e-15)
    # The seeds are a nat apart, but the two never differ by more than 0.1 within one.
    assert second.difference.deviation == pytest.approx(stdev([0.1, -0.1]), rel=1e-12)
    assert third.final_eval_loss is not None and third.final_eval_loss.deviation is None
    assert [loss.mean if loss else None for loss in third.eval_loss] == [10.0, 9.0]


def test_an_unfinished_run_is_no_end_result(tmp_path: Path) -> None:
    done = read_run(write_run(tmp_path / "a"))
    under_way = read_run(write_run(tmp_path / "b", losses=[3.0, 2.9], evals={2: 1.0}, finished=False))
    first, second = group_by_name([run_numbers(done), run_numbers(under_way)])
    assert second.final_eval_loss is None and second.difference is None
    assert first.final_eval_loss is not None
    assert "a, 2.4000" in _finding(compare_runs([done, under_way]))


def _finding(comparison: object) -> str:
    from sophia_galore.report.document import Paragraph
    from sophia_galore.report.sections import build_document

    opening = build_document(comparison).opening[0]  # type: ignore[arg-type]
    assert isinstance(opening, Paragraph)
    return opening.text


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    names = ["x/runs/galore-seed1", "x/runs/galore-seed2", "x/runs/adamw-seed1", "x/runs/old-seed1.previous-1"]
    for name in names:
        write_run(tmp_path / name, seed=int(name.split("-seed")[1][0]))
    write_run(tmp_path / "y/galore-seed1", seed=1)
    runs = read_runs([tmp_path / "x"])
    assert [(run.name, run.seed) for run in runs] == [("adamw", 1), ("galore", 1), ("galore", 2)]
    both = read_runs([tmp_path / "x/runs/galore-seed1", tmp_path / "y/galore-seed1"])
    assert [run.name for run in both] == ["runs/galore", "y/galore"]
    write_run(tmp_path / "z/a")
    write_run(tmp_path / "z/a-seed42")
    assert [run.name for run in read_runs([tmp_path / "z/a", tmp_path / "z/a-seed42"])] == ["a", "a-seed42"]
    with pytest.raises(UserError, match="is named twice"):
        read_runs([tmp_path / "x", tmp_path / "x/runs/adamw-seed1"])


BROKEN = {
    "no folder": (None, None, "is not a folder"),
    "no plan": ("plan.json", None, "can't be read"),
    "plan is no JSON": ("plan.json", "{", "is no JSON"),
    "plan is a list": ("plan.json", "[]", "is not what a run writes"),
    "plan lacks an entry": ("plan.json", "{}", "'optimizer' is missing"),
    "no configuration": ("run_config.yaml", None, "can't be read"),
    "configuration is no YAML": ("run_config.yaml", "a: [", "is not what a run writes"),
    "environment is no JSON": ("environment.json", "x", "is no JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_folder_is_named(case: str, tmp_path: Path) -> None:
    name, text, message = BROKEN[case]
    folder = tmp_path / "run"
    if name is not None:
        write_run(folder)
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_run(folder)
    assert raised.value.remedy


def test_a_run_that_ended_early_is_finished_and_its_final_model_counts(tmp_path: Path) -> None:
    patient = {"training": {"early_stopping_patience": 2}}
    early = {"losses": (3.0, 2.9, 2.8), "evals": {0: 3.1, 1: 2.5, 2: 2.6, 3: 2.7}, "waited": {2: 1, 3: 2}}
    run = read_run(write_run(tmp_path / "a", **early, config=patient, exported=(1, 2.5)))
    result = run_numbers(run)
    assert run.finished and result.ended_early and result.finished
    assert (result.exported_step, result.exported_eval_loss, result.final_eval_loss) == (1, 2.5, 2.5)
    (group,) = group_by_name([result])
    assert group.final_eval_loss is not None and group.final_eval_loss.mean == 2.5
    # One evaluation more of patience, or a run that is still under way: it is not finished.
    more = {"training": {"early_stopping_patience": 3}}
    assert not read_run(write_run(tmp_path / "b", **early, config=more)).finished
    assert not read_run(write_run(tmp_path / "c", **early, config=patient, finished=False)).finished
    # What was written by an earlier end counts no more once further steps are there.
    folder = write_run(tmp_path / "d", exported=(1, 2.5), finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 2.0}\n')
    assert run_numbers(read_run(folder)).exported_step is None


def test_a_report_says_how_a_run_ended(tmp_path: Path) -> None:
    early = {"losses": (3.0, 2.9, 2.8), "evals": {0: 3.1, 1: 2.5, 3: 2.7}, "waited": {3: 1}, "exported": (1, 2.5)}
    run = read_run(write_run(tmp_path / "a", **early, config={"training": {"early_stopping_patience": 1}}))
    said = str(build_document(compare_runs([run])))
    assert "ended early, after step 3 of 4; the final model is the best one, after step 1, with an eval loss" in said
    assert "ended early" not in str(build_document(compare_runs([read_run(write_run(tmp_path / "b"))])))
