"""Strict numerics, two CPU devices, one cache of compiled programs, and the table of slow tests.

`@pytest.mark.devices(8)` runs a test in its own process, with eight CPU devices. `slow` tests run only on request:
`-m slow`, or `-m ""` for everything.
"""

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# JAX checks neither the age nor the number of entries: `pytest_configure` removes old ones.
PROGRAMS = ROOT / ".pytest_cache" / "jax"
DAYS = 14


def xla_rejects_its_own_programs() -> bool:
    """Return whether a cache costs more than it saves on this CPU, as in `fcvit_jax.flags`."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    return "GenuineIntel" in text and "avx512f" in text and "amx_tile" not in text


# By environment variable, for the processes that tests start too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compiling: without LLVM's optimizations, with XLA's older emitter of loops and one thread per
# program, nine tests of models took 20 instead of 46 s of CPU time (JAX 0.10.2, 2026-11-28).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jax").startswith("0.10."):  # a later XLA may not know the flags, and would abort
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
if not xla_rejects_its_own_programs():
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAX_NUM_CPU_DEVICES", "2")))
jax.config.update("jax_default_matmul_precision", "highest")

LONG = (
    "test_train.py",
    "test_resumed.py",
    "test_end_to_end.py",
    "test_processes.py",
    "test_html.py",
    "test_browser.py",
)
# The tests that get the marker `slow`, by file; all of a file if none is named. A bracket starts a parametrisation.
SLOW: dict[str, tuple[str, ...]] = {
    "test_allocator.py": (),
    "test_benchmarks.py": (),
    "test_docs.py": (
        "test_the_command_runs_as_written[ViT-B_32.npz",
        "test_the_command_runs_as_written[deit3",
        "test_the_command_runs_as_written[dinov2_vits14_reg4",
        "test_the_command_runs_as_written[https:",
        "test_the_command_runs_as_written[vit_b_32.pth",
        "test_the_python_example_runs_as_written",
    ),
    "test_tutorial.py": ("test_the_cells_run_and_print_what_is_stored",),
    "test_end_to_end.py": (
        "test_bad_input_is_one_line_and_writes_nothing[fields6",
        "test_real_photos_under_five_schedules",
        "test_the_embedded_default",
        "test_the_wheel_works_outside_the_tree",
        "test_training_ends_in_a_checkpoint_that_evaluates",
    ),
    "convert/test_fuzz.py": (),
    "convert/test_backbones.py": (
        "test_features_and_logits_equal_the_real_library[CLIP, Hugging Face, both",
        "test_features_and_logits_equal_the_real_library[CLIP, Hugging Face, exact",
        "test_features_and_logits_equal_the_real_library[CLIP, OpenAI, ",
        "test_features_and_logits_equal_the_real_library[DINOv2 giant, Hugging Face, ",
        "test_features_and_logits_equal_the_real_library[DINOv3, Hugging Face, ",
        "test_features_and_logits_equal_the_real_library[DINOv3, timm, ",
        "test_features_and_logits_equal_the_real_library[EVA-02 CLIP, open_clip",
        "test_features_and_logits_equal_the_real_library[EVA-02, timm, backbone",
        "test_features_and_logits_equal_the_real_library[EVA-02, timm, reference",
        "test_features_and_logits_equal_the_real_library[I-JEPA",
        "test_features_and_logits_equal_the_real_library[PE, timm, no",
        "test_features_and_logits_equal_the_real_library[SigLIP, Hugging Face, ",
        "test_features_and_logits_equal_the_real_library[SigLIP, open_clip, no",
        "test_features_and_logits_equal_the_real_library[SigLIP, timm, ",
        "test_features_and_logits_equal_the_real_library[TIPS",
        "test_timm_loads_the_written_weights",
        "test_transformers_loads_the_written_weights",
    ),
    "convert/test_main.py": ("test_a_dinov3_as_large_as_vit_l_converts_within_three_times_its_size",),
    "convert/test_parity.py": (
        "test_logits_equal_the_real_library[DeiTForImageClassification",
        "test_logits_equal_the_real_library[Dinov2WithRegisters",
        "test_logits_equal_the_real_library[ViTForImageClassification,",
        "test_logits_equal_the_real_library[timm, hub",
        "test_timm_and_back_gives_the_same_bytes",
        "test_timm_loads_weights_from_elsewhere",
        "test_transformers_loads_the_written_weights",
    ),
    "evaluation/test_accuracy.py": (
        "test_every_image_counts_once_on_any_number_of_devices[5-1",
        "test_every_image_counts_once_on_any_number_of_devices[6-2",
        "test_every_image_counts_once_on_any_number_of_devices[8-1",
        "test_every_image_counts_once_on_any_number_of_devices[8-8",
    ),
    "evaluation/test_browser.py": (),
    "evaluation/test_evaluate.py": (
        "test_a_sweep_begins_with_dense_and_nothing_merged_is_dense",
        "test_loaded_checkpoints_sources_and_schedules_of_ones_own",
        "test_memory_does_not_grow_by_pixels",
        "test_published_accuracies_are_in_the_rows_of_those_weights_and_images",
    ),
    "evaluation/test_processes.py": (),
    "export/test_export.py": (
        "test_a_batch_may_be_spread_over_devices",
        "test_the_documentation_runs_as_written",
    ),
    "models/test_attention.py": ("test_many_keys_attend_by_some_heads_at_a_time",),
    "models/test_flops.py": ("test_every_layer_agrees_with_xla",),
    "models/test_fused.py": (),
    "models/test_merging.py": (
        "test_gradient_and_vmap",
        "test_window_by_window_equals_each_window_alone",
    ),
    "models/test_parity.py": (
        "test_dense_logits_on_real_photos_equal_timm",
        "test_merged_logits_on_real_photos_equal_the_reference",
        "test_small_models_equal_timm_and_the_reference[local:1",
        "test_the_comparison_can_fail",
        "test_proportional_attention_can_be_left_out",
    ),
    "models/test_positions.py": ("test_published_rules_keep_mass_and_merge_positions",),
    "models/test_published.py": (
        "test_nothing_removed_is_the_identity_and_gradients_are_finite",
        "test_one_device_equals_eight",
        "test_trained_weights_of_evit_convert_and_give_what_its_model_gives",
    ),
    "models/test_vit.py": (
        "test_parameters_cast_beforehand_give_the_same_bit_for_bit",
        "test_remat_gives_the_same_gradient",
        "test_stochastic_depth_drops_whole_branches_of_single_images",
        "test_the_pooled_tokens_alone_give_what_all_tokens_give[tome",
    ),
    "models/test_zoo.py": ("test_every_name_agrees_with_timm",),
    "flatness/test_main.py": (
        "test_a_checkpoint_against_itself",
        "test_a_run_is_measured_into_its_own_directory",
        "test_numbers_are_those_of_the_library",
        "test_two_checkpoints_are_compared",
    ),
    "flatness/test_measurement.py": (
        "test_a_checkpoint_under_a_schedule",
        "test_rotary_positions_a_gate_and_a_probe_are_measured",
        "test_the_loss_is_plain_cross_entropy",
    ),
    "search/test_correction.py": (
        "test_a_corrected_checkpoint_is_closer_on_other_images",
        "test_the_head_computes_the_mapped_logits",
    ),
    "probe/test_probe.py": (
        "test_features_are_used_again_and_an_interrupted_pass_resumes",
        "test_other_heads_poolings_and_schedules",
        "test_the_documentation_runs_as_written",
        "test_two_processes_find_the_head_of_one",
    ),
    "search/test_search.py": (),
    "search/test_simulate.py": (
        "test_every_kind_of_schedule_equals_the_real_model[class token-nearest",
        "test_every_kind_of_schedule_equals_the_real_model[distillation",
        "test_every_kind_of_schedule_equals_the_real_model[mean of the patches",
        "test_every_kind_of_schedule_equals_the_real_model[more than 256 tokens",
        "test_every_kind_of_schedule_equals_the_real_model[not proportional",
        "test_every_kind_of_schedule_equals_the_real_model[registers",
        "test_every_kind_of_schedule_equals_the_real_model[rotary",
        "test_options_of_the_rule",
        "test_rotary_keys",
        "test_the_packaged_digits",
    ),
    "test_own_model.py": (
        "test_the_linen_model_merges_as_ours[dense",
        "test_the_nnx_model_merges_as_ours[dense",
        "test_the_nnx_model_merges_as_ours[tome_r9",
    ),
    "test_own_rule.py": (
        "test_in_evaluation",
        "test_in_training",
        "test_under_vmap_and_grad",
    ),
    "test_study.py": ("test_training_ends_at_the_first_measurement_that_fits",),
    "test_parallel.py": (
        "test_a_cpu_is_taken_as_two_devices_unless_something_else_was_chosen[chosen",
        "test_a_cpu_is_taken_as_two_devices_unless_something_else_was_chosen[devices made",
        "test_a_cpu_is_taken_as_two_devices_unless_something_else_was_chosen[one core",
        "test_each_of_three_processes_prints_one_line_if_one_fails",
        "test_finished_processes_wait_for_the_others",
        "test_nothing_but_an_exit_at_once_ends_a_process_that_waits_in_an_exchange",
    ),
    "training/test_sam.py": ("test_eight_devices_equal_one_and_do_not_gather_the_batch",),
    "training/test_recent_steps.py": (
        "test_the_benchmark_feeds_one_device_of_several",
        "test_the_host_waits_for_a_batch_while_the_step_before_is_computed",
    ),
    "training/test_saved_states.py": ("test_a_state_comes_back_on_another_number_of_devices",),
    "training/test_starting_point.py": ("test_imagenets_head_stays_whatever_its_classes_are_called",),
    "training/test_targets.py": ("test_mixing_moves_one_row_between_devices",),
    "training/test_step.py": (
        "test_a_resumed_run_draws_what_the_whole_run_drew",
        "test_four_microbatches_take_less_than_a_third_of_the_memory",
        "test_one_device_equals_eight",
        "test_padding_changes_nothing",
        "test_remat_changes_nothing",
        "test_the_average_follows_its_formula",
        "test_the_gradient_is_plain_before_the_start_and_sams_after_it",
        "test_training_learns_in_one_compilation",
    ),
    "training/test_resumed.py": (),
    "training/test_train.py": (
        "test_a_full_disk_ends_a_run_in_one_line",
        "test_a_loss_that_is_not_finite_stops_with_the_images",
        "test_a_run_in_a_notebook",
        "test_fine_tuning_replaces_the_head_and_resamples",
        "test_a_run_that_an_unreadable_image_ended_resumes_without_it",
        "test_flatness_is_measured_at_the_end_if_configured",
        "test_sharded_leaves_are_trained_to_the_same",
        "test_unreadable_images_stop_it_or_are_skipped_and_counted_through_a_restart",
    ),
    "test_readme.py": ("test_the_example_of_an_own_model_merges_as_scheduled",),
    "search/test_budgets.py": ("test_layers_are_timed",),
    "convert/test_sidecar.py": ("test_the_gelu_of_each_siglip_is_that_of_timm",),
    "flatness/test_hessian.py": ("test_the_product_and_the_curvature_of_each_batch[vit",),
    "evaluation/test_features.py": (),
    "search/test_findings.py": ("test_chance_is_rarely_taken_for_better",),
    "evaluation/test_interrupted.py": ("test_a_bad_image_stops_it_or_is_skipped_and_the_work_before_is_kept",),
    "test_errors.py": ("test_a_closed_pipe_is_silent[-m fcvit_jax.convert --inspect",),
    "flatness/test_presentation.py": ("test_one_report_and_two",),
    "models/test_rules.py": ("test_prefix_tokens_count_in_the_alternation_and_never_merge",),
}
SHARED = ROOT.parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        PROGRAMS.mkdir(parents=True, exist_ok=True)
        for program in PROGRAMS.iterdir():
            if program.stat().st_mtime < time.time() - DAYS * 24 * 3600:
                program.unlink(missing_ok=True)


class Elsewhere(pytest.Item):
    """A test that runs in its own process, with more CPU devices than this one."""

    def __init__(self, *, devices: int, **arguments: Any):
        super().__init__(**arguments)
        self.devices = devices

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", self.nodeid]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(self.devices)}
        done = subprocess.run(command, cwd=self.config.rootpath, env=environment, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(done.stdout + done.stderr, pytrace=False)
        if " passed" not in done.stdout:
            pytest.skip(done.stdout)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow(config, items)
    for index, item in enumerate(items):
        mark = item.get_closest_marker("devices")
        if mark and mark.args[0] > jax.config.jax_num_cpu_devices:  # pyright: ignore[reportAttributeAccessIssue]
            parent: Any = item.parent
            items[index] = Elsewhere.from_parent(parent, name=item.name, devices=mark.args[0])
            items[index].own_markers.extend(item.own_markers)
    # The files that take minutes come first; otherwise one of two workers would be left alone with the last.
    items.sort(key=lambda item: item.path.name not in LONG)


def mark_slow(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests in `SLOW`. A file that does not exist, or a name that no test of it has, is an error."""
    unmatched = {}
    for file, names in SLOW.items():
        inside = [item for item in items if item.path == ROOT / "tests" / file]
        for name in names or ("",):
            start = name if "[" in name or not name else f"{name}["
            matching = [item for item in inside if f"{item.name}[".startswith(start)]
            for item in matching:
                item.add_marker("slow")
            whole = inside and not any("::" in argument for argument in config.args)
            if not matching and (whole or not (ROOT / "tests" / file).exists()):
                unmatched[f"{file} {name}".strip()] = True
    if unmatched:
        raise pytest.UsageError(f"tests/conftest.py: SLOW has what no test matches: {', '.join(unmatched)}")


def shared(relative: str) -> Path:
    """Find a file of the folder of real photos and weights beside the checkout, or skip the test."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is absent: the test needs real data that the project does not carry")
    return path


@pytest.fixture
def clothing_test() -> Path:
    """372 real photos in ten class folders."""
    return shared("data/clothing/test")


@pytest.fixture
def imagenet_samples() -> list[Path]:
    """251 real ImageNet files, among them odd sizes, greyscale and EXIF-rotated ones."""
    return sorted(shared("data/imagenet_samples").glob("*.JPEG"))


@pytest.fixture
def clothing_weights() -> Path:
    """A trained ViT-S/14 with ten classes, in timm's layout, float16."""
    return shared("weights/clothing_vits14.safetensors")
