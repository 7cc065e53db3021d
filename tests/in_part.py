"""Tests of which `make test` runs only some cases, since all of them take long; the others are `thorough`.

A case stands for the others of its test: they differ in a family, a format, a moment or a size, and the code that they
run is the same but for a branch. The cases that are run are spread evenly over all. A test with 0 cases is thorough as
a whole; what else covers it stands in CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

CASES: dict[str, int] = {
    "architecture/test_document_messages.py::test_a_heading_is_how_a_message_begins": 40,
    "contract/test_blocked_head.py::test_gradients_equal_autograd_on_the_decoded_weights": 8,
    "contract/test_blocked_head.py::test_gradients_of_drawn_labels": 2,
    "contract/test_distributed_checkpoint.py::test_goes_on_from_a_checkpoint_to_the_bit": 13,
    "contract/test_distributed_checkpoint.py::test_under_ddp": 1,
    "contract/test_forecast.py::test_a_run_takes_what_was_predicted": 3,
    "contract/test_forecast.py::test_more_micro_batches_than_are_run_are_computed": 1,
    "contract/test_forecast.py::test_so_it_is_with_kept_graphs": 1,
    "contract/test_forecast.py::test_so_it_is_with_what_is_seldom_asked_for": 2,
    "contract/test_forecast_twin.py::test_the_bytes_are_the_same": 4,
    "contract/test_forecast_twin.py::test_the_bytes_of_full_gradients_apart_are_the_same": 1,
    "contract/test_forecast_twin.py::test_the_bytes_of_packed_rows_are_the_same": 2,
    "contract/test_fsdp2.py::test_owners_equal_one_process_to_the_bit": 1,
    "contract/test_fsdp2.py::test_parts_equal_one_process": 1,
    "contract/test_fsdp2.py::test_real_models_by_their_owners_to_the_bit": 1,
    "contract/test_fsdp2.py::test_real_models_train_as_in_one_process": 1,
    "contract/test_fsdp2.py::test_rounding_is_that_of_one_process": 1,
    "contract/test_fsdp2.py::test_saved_by_two_goes_on_with_one_two_and_four": 0,
    "contract/test_fsdp2_trainers.py::test_accelerate": 1,
    "contract/test_full_gradients.py::test_in_other_architectures": 1,
    "contract/test_full_gradients.py::test_later_passes_are_repeated_without_the_earlier_ones": 0,
    "contract/test_full_gradients.py::test_the_bits_of_gradients_that_stand_together": 4,
    "contract/test_keep_layers.py::test_the_bits_of_products": 2,
    "contract/test_lazy_gradient.py::test_curvature_by_products_alone": 2,
    "contract/test_lazy_gradient.py::test_nothing_as_large_as_the_head_is_ever_made": 2,
    "contract/test_memory_of_files.py::test_a_conversion": 2,
    "contract/test_placements.py::test_a_limit_of_what_is_expected_is_enough": 0,
    "contract/test_placements.py::test_no_bit_depends_on_where_things_live": 3,
    "contract/test_processes.py::test_a_checkpoint_is_sent_to_a_machine_that_lacks_it": 1,
    "contract/test_processes.py::test_copies_that_drifted_apart_are_made_equal": 1,
    "contract/test_processes.py::test_each_process_streams_its_own_copy": 1,
    "contract/test_processes.py::test_no_bit_depends_on_where_states_are": 1,
    "contract/test_processes.py::test_the_curve_does_not_depend_on_the_number_of_processes": 2,
    "contract/test_processes.py::test_the_forecast_is_for_one_of_the_processes": 0,
    "contract/test_retry.py::test_no_weight_moves_twice": 1,
    "contract/test_retry.py::test_the_gradients_of_an_undisturbed_step": 4,
    "contract/test_retry_limits.py::test_a_repetition_takes_less_memory": 4,
    "contract/test_sharded_models.py::test_a_conversion_of_shards_is_that_of_the_whole": 10,
    "contract/test_sharded_models.py::test_what_is_exported_opens_in_transformers": 6,
    "contract/test_stepper.py::test_products_make_the_same_run": 3,
    "contract/test_torch_optimizers.py::test_learns_and_continues_from_disk_to_the_bit": 13,
    "contract/test_torch_optimizers_examples.py::test_example": 3,
    "contract/test_torch_optimizers_examples.py::test_the_sharded_loop_under_torchrun": 0,
    "contract/test_torch_optimizers_trainer.py::test_a_resumed_run_ends_on_the_same_bits": 2,
    "reference/test_objective.py::test_a_part_that_is_repeated_sees_the_same_examples": 2,
    "reference/test_optimizers.py::test_adamw_equals_torch": 1,
    "reference/test_optimizers.py::test_adamw_equals_torch_beside_plain_layers": 1,
    "reference/test_packing.py::test_packed_rows_are_their_examples": 6,
    "reference/test_packing.py::test_so_it_is_however_the_engine_works": 4,
    "resume/test_kill.py::test_killed_and_resumed_equals_uninterrupted": 4,
    "resume/test_placed_kill.py::test_killed_at_any_moment": 2,
    "resume/test_placed_resume.py::test_a_run_goes_on_wherever_things_lived_before": 2,
    "resume/test_process_failures.py::test_a_killed_process": 1,
    "resume/test_process_failures.py::test_one_process_is_asked_to_stop": 1,
    "unit/bench/test_long_run.py::test_a_run_in_small_is_measured_and_goes_on_after_it_was_ended": 2,
    "unit/bench/test_peers_runs.py::test_an_adapter_is_trained_measured_and_resumed": 1,
    "unit/cli/test_cli_compare.py::test_ctrl_c_saves_and_names_the_way_on": 0,
    "unit/cli/test_cli_generate.py::test_before_and_after_are_compared": 2,
    "unit/cli/test_cli_int8.py::test_a_converted_checkpoint_goes_on": 3,
    "unit/cli/test_cli_plan.py::test_where_nothing_fits_the_ladder_is_shown_and_nothing_written": 0,
    "unit/cli/test_cli_predicted.py::test_two_percent_more_than_predicted_is_enough": 1,
    "unit/cli/test_cli_predicted.py::test_where_no_settings_fit_that_is_said": 0,
    "unit/cli/test_cli_run.py::test_a_run_ends_well_and_leaves_its_files": 2,
    "unit/cli/test_cli_stop.py::test_a_stopped_run_goes_on_to_the_same_bits": 1,
    "unit/cli/test_cli_streamed.py::test_a_full_disk": 2,
    "unit/cli/test_cli_streamed.py::test_damage": 1,
    "unit/doctor/test_each_break_is_found.py::test_a_break_is_found": 12,
    "unit/engine/test_generate.py::test_the_tokens_are_those_of_transformers": 6,
    "unit/memory/test_composition.py::test_composed_from_few_layers_it_is_that_of_all": 2,
    "unit/model/test_specifications.py::test_plan_counts_as_transformers_does": 0,
    "unit/model/test_specifications.py::test_the_model_has_the_published_number_of_parameters": 20,
    "unit/report/test_report_plots.py::test_the_memory_of_any_run_can_be_drawn": 6,
    "unit/report/test_report_timeline.py::test_no_label_of_any_timeline_crosses_another_or_the_edge": 13,
    "unit/train/test_placement_on_gpu.py::test_on_what_stands_for_a_gpu": 2,
    "unit/train/test_preflight.py::test_examples_that_never_end_are_warned_of": 1,
    "unit/train/test_preflight.py::test_how_many_checkpoints_there_will_be": 5,
    "unit/train/test_preflight.py::test_what_is_announced_is_what_is_written": 2,
    "unit/train/test_preflight_probe.py::test_a_probe_changes_no_bit": 2,
    "unit/train/test_replaced_model.py::test_killed_at_any_moment": 1,
    "unit/train/test_sharded_runs.py::test_a_checkpoint_is_exported_and_resumed": 1,
    "unit/train/test_sharded_runs.py::test_killed_and_resumed_it_has_the_same_files": 1,
    "unit/train/test_train_best.py::test_the_best_checkpoint_stays": 2,
    "unit/train/test_train_best.py::test_the_final_model_is_the_best_one_to_the_bit": 3,
    "unit/train/test_train_keep.py::test_a_run_with_kept_graphs_has_the_bits_of_one_without": 1,
}
"""By test, how many of the cases that are not marked otherwise run by default."""


def spread(count: int, num_kept: int) -> set[int]:
    """Return the indices of cases that are kept, the first one among them.

    Args:
        count: How many cases there are.
        num_kept: How many are kept; all, if there are no more.
    """
    return {index * count // num_kept for index in range(num_kept)} if num_kept < count else set(range(count))


def leave_cases_to_thorough(items: Sequence[pytest.Item]) -> None:
    """Mark as `thorough` the cases that the table leaves out.

    Args:
        items: Everything that was collected. Where fewer cases were asked for than are kept, all of them run.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        is_left = item.get_closest_marker("thorough") or item.get_closest_marker("by_hand")
        if not is_left and (name := _name(item)) in CASES:
            tests.setdefault(name, []).append(item)
    for name, cases in tests.items():
        kept = spread(len(cases), CASES[name])
        for index, item in enumerate(cases):
            if index not in kept:
                item.add_marker(pytest.mark.thorough)


def gone(items: Sequence[pytest.Item]) -> list[str]:
    """Return the names of the table that no test has, of the files that were collected as a whole.

    Args:
        items: Everything that was collected.
    """
    names = {_name(item) for item in items}
    collected = {name.partition("::")[0] for name in names}
    return [name for name in CASES if name.partition("::")[0] in collected and name not in names]


def _name(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0].removeprefix("tests/")
