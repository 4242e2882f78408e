"""Small faults, planted one at a time by `scripts/mutate`: what each does in words, where, and the tests nearest to it.

A mutation is a text that stands once in a module and what takes its place. They are mistakes that a person could make:
no crashes, and nothing that changes no result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """A fault: `old` stands once in the module's source and `new` takes its place; `tests` are pytest's node ids."""

    name: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]

    def problem(self) -> str | None:
        """Why it cannot be planted, or None."""
        count = file_of(self.module).read_text().count(self.old)
        return None if count == 1 else f"its old text stands {count} times in the module"


def file_of(module: str) -> Path:
    """The source file of a module or package of cnnrun."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def changed_source(mutation: Mutation) -> str:
    """The module's source with the fault in it."""
    return file_of(mutation.module).read_text().replace(mutation.old, mutation.new)


def faults(module: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutation]:
    """Mutations of one module, with the same nearest tests (names between spaces): (what it does, old, new) each."""
    return [Mutation(name, f"cnnrun.{module}", old, new, tuple(tests.split())) for name, old, new in changes]


# fmt: off
LEARNING = (
    "test_train.py::test_accumulated_gradients_are_the_whole_batchs "
    "test_train.py::test_it_can_overfit_eight_pictures "
    "test_train.py::test_a_clipped_step_is_as_long_as_the_clip_whatever_the_losses_were_scaled_by "
    "test_train.py::test_dropout_is_a_function_of_the_step_and_the_rank "
    "test_train.py::test_the_loss_of_a_batch_is_the_mean_over_its_pictures_whatever_its_parts "
    "test_train.py::test_the_average_is_of_the_weights_after_each_step_by_its_decay_and_is_what_val_measures "
    "test_train.py::test_each_step_goes_by_the_schedule_at_its_own_number "
    "test_train.py::test_an_epoch_has_as_many_batches_as_its_pictures_fill "
    "test_train.py::test_an_evaluation_that_is_just_as_good_is_no_progress "
    "test_train.py::test_best_early_stop_and_keep "
    "test_transfer.py::test_a_step_with_groups_is_a_step_of_each_optimizer "
    "test_train.py::test_resumed_is_uninterrupted_to_the_bit[5] "
    "test_train.py::test_resumed_is_uninterrupted_to_the_bit[17] "
    "test_train.py::test_not_a_number_stops_at_once_names_files_and_layer_and_saves_nothing "
    "test_train.py::test_it_learns"
)
TROUBLE = (
    "test_trouble.py::test_what_is_not_finite_stops_within_its_step_is_named_and_never_saved[input-nan] "
    "test_trouble.py::test_what_is_not_finite_stops_within_its_step_is_named_and_never_saved[gradient-nan] "
    "test_trouble.py::test_what_is_not_finite_stops_within_its_step_is_named_and_never_saved[weight-nan] "
    "test_trouble.py::test_momentum_that_is_not_finite_is_not_saved_either "
    "test_trouble.py::test_too_little_memory_is_as_if_smaller_micro_batches_had_been_asked_for[20-1-4-MemoryError] "
    "test_trouble.py::test_memory_that_runs_out_later_is_remembered_when_resuming "
    "test_trouble.py::test_too_little_memory_for_the_smallest_micro_batch_is_one_line "
    "test_trouble.py::test_a_step_that_ran_out_of_memory_leaves_no_gradient_of_the_parts_that_were_done "
    "test_trouble.py::test_micro_batches_become_as_small_as_one_picture"
)
RANKS = (
    "test_ranks.py::test_shares_are_a_partition_of_each_micro_batch "
    "test_ranks.py::test_statistics_that_each_rank_measured_apart_become_their_mean "
    "test_ranks.py::test_every_rank_has_its_part_of_the_same_batches "
    "test_ranks.py::test_evaluation_is_that_of_one_process[2] "
    "test_train.py::test_dropout_is_a_function_of_the_step_and_the_rank"
)
FREEZING = (
    "test_transfer.py::test_frozen_layers_and_their_statistics_stay_and_the_rest_learns "
    "test_transfer.py::test_features_computed_once_learn_as_features_computed_each_step"
)
PAIRS = (
    "test_verification.py::test_curves_are_scikit_learns test_verification.py::test_weights_count_a_pair_so_often "
    "test_verification.py::test_the_equal_error_rate_is_where_the_interpolated_curve_meets_the_diagonal "
    "test_verification.py::test_a_threshold_for_a_far_keeps_it_and_no_lower_one_does "
    "test_verification.py::test_a_far_that_is_reached_exactly_is_taken "
    "test_verification.py::test_all_pairs_are_all_and_in_even_folds "
    "test_verification.py::test_of_many_pictures_some_pairs_are_measured_none_twice "
    "test_verification.py::test_a_folds_threshold_does_not_look_at_the_fold "
    "test_verification.py::test_intervals_hold_the_number_and_narrow_with_people "
    "test_verification.py::test_a_bootstrap_sample_is_its_people_each_copy_a_person_of_its_own "
    "test_verification.py::test_a_far_that_few_pairs_carry_is_said"
)
PEOPLE = (
    "test_verification.py::test_a_threshold_that_val_chooses_lies_halfway_between_two_similarities "
    "test_verification.py::test_identification_enrolls_as_many_pictures_as_the_task_says "
    "test_verification.py::test_people_who_are_learned_from_are_numbered_and_no_others_have_a_centre "
    "test_verification.py::test_pairs_is_what_a_meter_is_given "
    "test_verify.py::test_no_class_is_in_two_splits_and_others_are_learned"
)
PARITY = "export/test_onnx.py export/test_code.py::test_code_that_is_not_the_network_is_not_kept"
RESUMING = (
    "test_honest_resume.py::test_other_settings_are_said_and_strictly_refused "
    "test_honest_resume.py::test_what_changes_no_bit_is_no_other_setting "
    "test_honest_resume.py::test_a_machine_in_between_is_remembered "
    "test_honest_resume.py::test_strictly_every_machine_before_counts_not_the_last_alone"
)
CALIBRATED = (
    "test_study.py::test_a_temperature_that_was_put_on_is_found "
    "test_study.py::test_the_temperature_is_where_the_likelihood_is_highest "
    "test_study.py::test_what_was_calibrated_is_used_everywhere "
    "test_study.py::test_every_checkpoint_keeps_a_calibration_of_its_own"
)
LEAKS = (
    "test_dataset.py test_data_commands.py::test_what_training_would_refuse_is_an_error_and_all_of_it_is_told "
    "test_data_commands.py::test_what_the_config_lets_be_is_left_out_and_listed "
    "test_data_commands.py::test_a_group_in_two_splits_is_a_leak"
)

MUTATIONS = [
    # --- learning ---------------------------------------------------------------------------------------------------
    *faults("training.step", LEARNING,
        ("micro-batches of unequal size weigh alike",
         "* (len(part) / part.whole)", "* (1 / len(batch.micro()))"),
        ("the loss that is told is the last micro-batch's",
         "        total += loss.detach()", "        total = loss.detach()"),
        ("dropout draws the same at every step",
         "seed_step(job.seed, step, job.ranks.rank, job.device)", "seed_step(job.seed, 0, job.ranks.rank, job.device)"),
        ("all groups learn at the first group's rate",
         'group["peak"] * factor', 'learner.optimizer.param_groups[0]["peak"] * factor'),
        ("gradients of earlier steps are kept",
         "learner.scaler.update()\n    learner.optimizer.zero_grad()", "learner.scaler.update()"),
        ("the average's decay is that of the next step",
         "learner.ema.update(step)", "learner.ema.update(step + 1)"),
    ),
    *faults("training.step", RANKS,
        ("every rank drops out the same",
         "job.ranks.rank, job.device)", "0, job.device)"),
        ("batch norm's statistics are added over ranks, not averaged",
         "            value /= job.ranks.size\n", "            value /= 1\n"),
    ),
    *faults("training.step", TROUBLE,
        ("a step that ran out of memory leaves its statistics behind",
         "            value.copy_(old)", "            old.copy_(value)"),
        ("a step that ran out of memory leaves its gradients behind",
         "    learner.optimizer.zero_grad()\n    with torch.no_grad():", "    with torch.no_grad():"),
        ("nobody looks at the gradients",
         "torch.stack([loss.float(), _sum(gradients, loss)", "torch.stack([loss.float(), _sum([], loss)"),
        ("micro-batches of one picture are not tried",
         "job.spec.smallest(count) < twice", "job.spec.smallest(count) <= twice"),
    ),
    *faults("training.loss_monitor", f"{LEARNING} {TROUBLE}",
        ("an epoch's mean loss has the last step's loss alone in it",
         "self._state.loss_sum += values[0]", "self._state.loss_sum = values[0]"),
        ("a step's numbers are looked at a step later",
         '_LAG = {"cpu": 0,', '_LAG = {"cpu": 1,'),
        ("the pictures named are those of the step after",
         "self._lines(self._state.step - 1,", "self._lines(self._state.step,"),
        ("a picture is sound if any of its pixels is",
         "pictures.flatten(1).isfinite().all(1)", "pictures.flatten(1).isfinite().any(1)"),
    ),
    *faults("training.settings", LEARNING,
        ("an epoch that divides evenly has an empty batch more",
         "else -(-pictures // self.batch)", "else pictures // self.batch + 1"),
        ("early stop waits once more than it was told",
         "waited >= self.early_stop.patience", "waited > self.early_stop.patience"),
    ),
    *faults("training.learner",
            f"{LEARNING} test_train.py::test_a_batch_of_one_with_batch_norm_is_refused_before_training "
            "test_train.py::test_the_best_is_the_best_whatever_counts_as_progress",
        ("val is measured as if it were training",
         "self.network.eval()\n        examples, forward", "examples, forward"),
        ("what is measured is not the average",
         "average = self.ema.average if self.ema else {}\n        weights",
         "average: dict[str, Tensor] = {}\n        weights"),
        ("the average that is saved is the weights",
         'parts["ema"] = self.ema.average', 'parts["ema"] = self.network.state_dict()'),
    ),
    *faults("training.learner", "test_controls.py::test_with_everything_the_resumed_run_is_the_same[overrides2]",
        ("the scaler begins anew after a resume",
         'self.scaler.load_state_dict(saved.state["scaler"])', "self.scaler.load_state_dict(self.scaler.state_dict())"),
    ),
    *faults("training.learner", "test_verify.py::test_resumed_is_uninterrupted",
        ("the classes' centres begin anew after a resume",
         'self.criterion.load_state_dict(saved.parts.get("criterion", {}))',
         "self.criterion.load_state_dict(self.criterion.state_dict())"),
    ),
    *faults("training.learner", FREEZING,
        ("frozen batch norms measure again once val was",
         "finally:\n            hold(self.network, job.spec.freeze)\n\n",
         "finally:\n            self.network.train()\n\n"),
    ),
    *faults("training.loop", f"{LEARNING} test_train.py::test_the_best_is_the_best_whatever_counts_as_progress",
        ("an evaluation that is no better starts the waiting anew",
         "(value - state.mark) * way > margin", "(value - state.mark) * way >= margin"),
        ("the schedule is a step ahead",
         "spec.schedule.factor(state.step, total)", "spec.schedule.factor(state.step + 1, total)"),
    ),
    *faults("training.schedules", "test_optim.py",
        ("what follows the warm-up ends before its end",
         "(step - climb) / max(1.0, total - climb)", "(step - climb) / max(1.0, total)"),
        ("the cosine is cut off at its end instead of reaching it",
         "self.end + (1 - self.end) * (1 + math.cos(math.pi * progress)) / 2",
         "max(self.end, (1 + math.cos(math.pi * progress)) / 2)"),
        ("a milestone counts a step late",
         "step >= milestone * total", "step > milestone * total"),
    ),
    *faults("training.optimizers", "test_optim.py test_transfer.py::test_groups_have_rates_and_decay_of_their_own "
            "test_transfer.py::test_a_wrong_name_is_told_with_what_there_is",
        ("a group of conv1 takes conv10 as well",
         'name.startswith(f"{self.params}.")', "name.startswith(self.params)"),
        ("a group without a decay of its own has none",
         "self.weight_decay if group.weight_decay is None", "0.0 if group.weight_decay is None"),
        ("the last group that names a parameter has it",
         "next((place for place, group in enumerate(self.groups) if group.takes(name)), len(self.groups))",
         "max((place for place, group in enumerate(self.groups) if group.takes(name)), default=len(self.groups))"),
        ("the average's decay is the larger of the two",
         "1 - min(self.decay,", "1 - max(self.decay,"),
        ("NAdam's default rate is Adam's",
         "lr: float = Field(2e-3, gt=0)", "lr: float = Field(1e-3, gt=0)"),
        ("a state that lacks a moment is taken",
         "if keys != expected", "if not keys <= expected"),
    ),
    # --- batches and what is done to pictures -----------------------------------------------------------------------
    *faults("data.training_batches", "test_batches.py test_boxes_follow.py test_splitting.py",
        ("a picture's partner is itself",
         "torch.arange(1, partners + 1)) % whole", "torch.arange(partners)) % whole"),
        ("mixed labels have the parts the other way round",
         "{name: values[partner] for name, values in targets.items()}, part)",
         "{name: values[partner] for name, values in targets.items()}, 1 - part)"),
        ("a sample shown twice in an epoch is changed alike",
         "numbers.to(self._device, non_blocking=True)", "samples.to(self._device, non_blocking=True)"),
        ("a go reaches into the next epoch",
         "return min(step + self._ahead, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)",
         "return step + self._ahead"),
    ),
    *faults("data.training_batches", "test_batches.py",
        ("batches made before memory ran out stay as large",
         "self._ready, self._coming = {}, {}", "self._coming = {}"),
    ),
    *faults("data.training_batches", RANKS,
        ("each rank measures every batch",
         "split(batch)[rank::size]", "split(batch)[::1]"),
    ),
    *faults("base.randomness", "test_randomness.py test_batches.py",
        ("every epoch has the first one's order",
         "bits(seed, epoch, torch.arange(count)", "bits(seed, 0, torch.arange(count)"),
        ("seed and epoch are added, not mixed",
         "+ key(seed, epoch))", "+ key(seed + epoch))"),
        ("the rank is not mixed into a step's seed",
         "key(seed, step, 1 + rank)", "key(seed, step, 1)"),
        ("a uniform number loses its last bit",
         "bits(seed, epoch, index_B, slot_S), 40).float() * 2.0**-24",
         "bits(seed, epoch, index_B, slot_S), 41).float() * 2.0**-23"),
    ),
    *faults("data.augment.settings", "test_augment.py test_boxes_follow.py",
        ("pictures move down by parts of their width",
         'drawn("shift_y", shape[2]), drawn("shift_x", shape[3])',
         'drawn("shift_y", shape[3]), drawn("shift_x", shape[2])'),
        ("hues turn one way alone",
         'reach["hue"] * draws.sign("hue")', 'reach["hue"] * draws["hue"]'),
        ("at most 15 % of a picture is blanked",
         "(0.02 + 0.31 * draws", "(0.02 + 0.13 * draws"),
        ("blank rectangles are never wide",
         'math.log(1 / 0.3) * draws.sign("erase_shape")', 'math.log(1 / 0.3) * draws["erase_shape"]'),
        ("the policy goes as far as it can whatever its strength",
         "(reach * self.policy.strength)", "reach"),
        ("pictures shrink where they are to grow",
         'size = 1 / (1 + reach["scale"] * draws.sign("scale"))', 'size = 1 + reach["scale"] * draws.sign("scale")'),
    ),
    *faults("data.augment.geometry", "test_augment.py test_boxes_follow.py",
        ("crops are as high as they are to be wide",
         "wide = torch.sqrt(pixels * aspect).clamp(1, width)\n    tall = torch.sqrt(pixels / aspect)",
         "wide = torch.sqrt(pixels / aspect).clamp(1, width)\n    tall = torch.sqrt(pixels * aspect)"),
        ("a box of which a line is left is an object",
         "there = (sides >= 1).all(-1)", "there = (sides >= 1).any(-1)"),
        ("boxes reach out of the picture on the left",
         "low.clamp(min=0).minimum(edge)", "low.minimum(edge)"),
        ("what is visible of an enlarged object is told too high",
         '((targets["boxes"][..., 2:] - targets["boxes"][..., :2]) @ stretch.mT).prod(2)',
         '(targets["boxes"][..., 2:] - targets["boxes"][..., :2]).prod(2)'),
        ("a safe crop holds the padding as if it were an object",
         'there = (targets["objects"] >= 0)[..., None]', 'there = torch.ones_like(boxes[..., :1], dtype=torch.bool)'),
        ("what moves in is the edge again",
         'padding_mode="zeros"', 'padding_mode="border"'),
    ),
    *faults("data.augment.colour", "test_augment.py",
        ("contrast goes around the grey that was before brightness",
         "(pictures.mean((2, 3)) * weight_C).sum(1)[:, None] * gain",
         "(pictures.mean((2, 3)) * weight_C).sum(1)[:, None]"),
        ("colours leave 0 to 255",
         "return mixed.view_as(pictures).clamp_(0, 255)", "return mixed.view_as(pictures)"),
        ("all pictures have the same noise",
         "raw = bits(seed, epoch, index_B, slots)", "raw = bits(seed, epoch, torch.zeros_like(index_B), slots)"),
        ("rectangles never reach the last row",
         "(y_B * (height - tall + 1)).floor()", "(y_B * (height - tall)).floor()"),
        ("rectangles are a pixel too long",
         "(place < (start_B + length_B)[:, None])", "(place <= (start_B + length_B)[:, None])"),
    ),
    *faults("data.augment.random_slots", "test_augment.py",
        ("what goes either way goes half as far",
         "self._values[slot] * 2 - 1", "self._values[slot] - 0.5"),
    ),
    *faults("data.augment.mixing", "test_augment.py test_boxes_follow.py",
        ("a part is drawn from the lower ends of the quantiles",
         "torch.arange(_LEVELS).double() + 0.5", "torch.arange(_LEVELS).double() + 1e-9"),
        ("labels go by the area that was to be pasted",
         "1 - patch.float().mean((1, 2))", "1 - area / (height * width)"),
        ("four pictures meet anywhere",
         '(width * (0.25 + 0.5 * draws["mosaic_x"])).round()', '(width * draws["mosaic_x"]).round()'),
        ("a picture of a mosaic does not cover its corner",
         "torch.maximum(wide / width, tall / height)", "torch.minimum(wide / width, tall / height)"),
    ),
    # --- boxes ------------------------------------------------------------------------------------------------------
    *faults("base.boxes", "test_boxes.py",
        ("boxes apart both ways overlap",
         "- start).clamp_(min=0)", "- start)"),
        ("boxes of one class suppress those of another",
         "    beats &= labels_BM[:, :, None] == labels_BM[:, None]\n", ""),
    ),
    *faults("tasks.detection.average_precision", "test_average_precision.py tasks/test_detect.py",
        ("boxes are not cut at the given picture's edges",
         "- offset) / scale).clip(0, size)", "- offset) / scale)"),
        ("crowds are counted among the objects",
         'if each["area"] < _BEYOND and not each["iscrowd"]', 'if each["area"] < _BEYOND'),
        ("a class's AP50 is its AP75",
         '"AP50": _mean(precision[0, :, k, 0, -1])', '"AP50": _mean(precision[5, :, k, 0, -1])'),
        ("recall levels that are not reached are left out of AP",
         "known = values[values > -1]", "known = values[values > 0]"),
    ),
    *faults("tasks.detection.assignment", "test_assigning.py tasks/test_detect.py",
        ("a cell whose middle lies on the edge is inside",
         "(2 * x - x1 - x2).abs().lt(wide)", "(2 * x - x1 - x2).abs().le(wide)"),
        ("a cell that several want goes to the one it is best aligned with",
         "wanted = torch.where(chosen, overlap_BMA, -1.0)", "wanted = torch.where(chosen, align_BMA, -1.0)"),
        ("an object's best cell need not reach its best overlap",
         "(align * scale[:, :, None]).amax(1)", "align.amax(1)"),
        ("a cell that learns an object within a crowd does not count",
         "quality_BA, taken_BA | ~vague)", "quality_BA, ~vague)"),
    ),
    *faults("tasks.detection.head", "tasks/test_detect.py",
        ("levels that share towers share batch norms",
         'f"{tower}_norms.{level}"', 'f"{tower}_norms.{kind}"'),
        ("boxes end at the picture's edges the other way round",
         "torch.tensor([width, height, width, height]", "torch.tensor([height, width, height, width]"),
        ("distances have no bound",
         "sides_B4HW.clamp(_NEAR, _FAR).exp()", "sides_B4HW.exp()"),
        ("a new network is sure of everything",
         "nn.init.constant_(self.bias, -math.log(", "nn.init.constant_(self.bias, math.log("),
    ),
    *faults("data.box_placement", "test_boxes_follow.py test_tiles.py",
        ("boxes begin left of the picture",
         "* scale + offset).clamp(min=0)", "* scale + offset)"),
        ("a line that a crop left of an object is one",
         ">= 1).all(1)", ">= 1).any(1)"),
    ),
    # --- numbers ----------------------------------------------------------------------------------------------------
    *faults("tasks.classification_metrics", "tasks/test_classify.py tasks/test_multilabel.py",
        ("rows and columns of the confusion are exchanged",
         "self._labels * self._classes + self._predicted", "self._predicted * self._classes + self._labels"),
        ("the calibration error is the mean over bins",
         "np.abs(true - probability).sum() / count.sum()", "np.abs(true - probability).sum() / BINS"),
        ("equal scores are told apart",
         "np.r_[score[1:] != score[:-1], np", "np.r_[score[1:] == score[1:], np"),
        ("a score at its threshold is not shown",
         "score_NK >= threshold_K", "score_NK > threshold_K"),
        ("a threshold chosen takes the next score as well",
         "return middle if lower < middle < upper else upper", "return lower"),
    ),
    *faults("tasks.intervals", "test_resampling.py::test_draws_are_of_all_samples_and_the_same_for_all_who_ask "
            "test_resampling.py::test_the_bootstrap_of_a_mean_is_its_standard_error "
            "test_resampling.py::test_an_interval_is_the_middle_of_the_draws_with_their_bias_taken_off_twice "
            "test_resampling.py::test_wilsons_interval_is_scipys_and_has_a_width_where_all_are_right",
        ("samples are drawn without being put back",
         "draw.integers(0, count, count)", "draw.permutation(count)"),
        ("intervals are of 90 %",
         "(0.025, 0.975))", "(0.05, 0.95))"),
        ("the bias is taken off once",
         "known - 2 * (np.median(known) - value)", "known - (np.median(known) - value)"),
        ("the interval of a share is of 90 %",
         "1.959964", "1.644854"),
    ),
    *faults("tasks.temperature", CALIBRATED,
        ("no network is too unsure",
         "bounds = (math.log(LEAST), math.log(MOST))", "bounds = (0.0, math.log(MOST))"),
    ),
    *faults("results.calibrate", CALIBRATED,
        ("the temperature is fitted on what is reported",
         'eval_data(experiment, given, "val")', "eval_data(experiment, given, None)"),
        ("a temperature is fitted on top of the one before",
         "calibrated=False)", "calibrated=True)"),
    ),
    *faults("tasks.embedding.losses", "test_margins.py",
        ("the margin grows over the whole training",
         "min(1.0, done / self.warmup)", "min(1.0, done)"),
        ("the margin turns round beyond pi less itself",
         "torch.where(cosine > -math.cos(self.margin), turned, -2 - turned)", "turned"),
        ("the mean of triplets is over those that still have a loss",
         "/ pairs.sum().clamp(min=1)", "/ (loss * pairs > 0).sum().clamp(min=1)"),
        ("centres count by their lengths",
         "F.normalize(self.centres).T", "self.centres.T"),
    ),
    *faults("tasks.embedding.pair_metrics", PAIRS,
        ("a threshold whose FAR is just the one wanted is not taken",
         "far * (1 + 1e-12)", "far * (1 - 1e-12)"),
        ("a threshold chosen lets the next pair in",
         "return middle if middle > lower else upper", "return lower"),
        ("a fold's threshold is chosen on the fold",
         "ranked.curve((~here).astype(np.float64))", "ranked.curve(here.astype(np.float64))"),
        ("half of the people are drawn",
         "draw.integers(0, len(names), len(names))", "draw.integers(0, len(names), len(names) // 2)"),
        ("similarities are added in float32",
         "one, other, dtype=np.float64)", "one, other)"),
        ("the equal error is told at the threshold before it",
         "part = before / (before - after)", "part = 0.0 * before"),
    ),
    *faults("training.evaluate",
            "test_train.py::test_the_loss_of_a_split_is_the_criterions_sum_with_each_sample_counted_once "
            "test_ranks.py::test_evaluation_is_that_of_one_process[2]",
        ("a smaller last batch weighs as much as the others",
         ".double() * len(index)", ".double() * batch"),
        ("of several losses the mean is told",
         "torch.stack(list(losses.values())).sum()", "torch.stack(list(losses.values())).mean()"),
    ),
    # --- tasks ------------------------------------------------------------------------------------------------------
    *faults(
        "tasks.classify",
        "tasks/test_classify.py tasks/test_losses.py test_augment.py::test_labels_follow_mixed_pictures",
        ("balanced weights go by the largest class",
         "(counts.sum() / (len(counts) * counts)).float()", "(counts.max() / counts).float()"),
        ("maps of classes are averaged before the ReLU",
         "F.relu(self.conv(x)).mean((2, 3))", "F.relu(self.conv(x).mean((2, 3)))"),
        ("an exported file may be off by a hundredth",
         "if not gap <= 1e-4:", "if not gap <= 1e-2:"),
    ),
    *faults("tasks.multilabel", "tasks/test_multilabel.py",
        ("a label at its threshold is not given",
         "if p >= t]", "if p > t]"),
        ("F1 is told at thresholds chosen where it is told",
         'found = Present(kept["score"], kept["present"], self._thresholds)',
         'best = Present(kept["score"], kept["present"], self._thresholds).best_thresholds()\n'
         '        found = Present(kept["score"], kept["present"], np.array(best))'),
        ("balanced weights go by all pictures, not by those without the label",
         '((facts.counts["train"] - counts).clamp(min=1) / counts)', '(facts.counts["train"] / counts)'),
    ),
    *faults("tasks.regression.task", "tasks/test_regress.py test_study.py::test_a_temperature_that_was_put_on_is_found",
        ("a file may be as far off as the largest number allows",
         "/ (number.std or 1.0))", "/ max(each.std or 1.0 for each in numbers))"),
        ("a temperature is not put on angles",
         "von_mises(angle, unit, temperature)", "von_mises(angle, unit, 1.0)"),
        ("numbers are measured by their places in the task",
         'targets["numbers"][:, self._places], **results', 'targets["numbers"][:, : len(self._places)], **results'),
    ),
    *faults("tasks.detection.task", "tasks/test_detect.py",
        ("crowds are learned as objects",
         'real = there & (targets["roles"] == OBJECT)', "real = there"),
        ("the loss grows with the batch",
         "1 / (self.per_picture * len(outputs_BAF))", "1 / self.per_picture"),
        ("boxes are drawn by the first class's score",
         'label)\n                for box, score, label in zip(*row, strict=True)\n'
         '                if label >= 0 and score >= least[label]',
         'label)\n                for box, score, label in zip(*row, strict=True)\n'
         '                if label >= 0 and score >= least[0]'),
        ("cells are drawn at the object after theirs",
         '(targets["objects"][0] >= 0).cumsum(0) - 1', '(targets["objects"][0] >= 0).cumsum(0)'),
        ("boxes that a file adds are not looked at",
         'torch.cat([alike.amax(2)[ours["scores"] > least], alike.amax(1)[theirs["scores"] > least]])',
         'alike.amax(2)[ours["scores"] > least]'),
    ),
    *faults("tasks.embedding.task", PEOPLE,
        ("a threshold chosen stands on a pair's own similarity",
         "curve.between(curve.at(far)) for far", "float(curve.threshold[curve.at(far)]) for far"),
        ("rank 1 is told as nobody before it",
         "float((ranks <= k).mean())", "float((ranks < k).mean())"),
        ("one picture of each person is enrolled whatever is asked",
         "gallery_metrics.first_ones(labels, self._task.gallery)", "gallery_metrics.first_ones(labels, 1)"),
        ("people who are not trained on have centres",
         "torch.where(counts > 0, (counts > 0).cumsum(0) - 1, -1)", "torch.arange(len(counts))"),
    ),
    # --- what is kept -----------------------------------------------------------------------------------------------
    *faults("training.checkpoints", "test_checkpoint.py",
        ("a checkpoint more than asked for is kept",
         "generations(folder.path)[:-keep]", "generations(folder.path)[: -keep - 1]"),
        ("the best is removed once it is old",
         'pointer in ("latest", "best")}\n    for old', 'pointer in ("latest",)}\n    for old'),
        ("generations go by their names",
         "sorted(found, key=_step)", "sorted(found)"),
        ("what was saved takes the place of what val said",
         "state |= _read_state(folder, EVALUATION, manifest)",
         "state = _read_state(folder, EVALUATION, manifest) | state"),
        ("a tensor is sound if any of its numbers is finite",
         "value.float()).isfinite().all())", "value.float()).isfinite().any())"),
        ("without a pointer the oldest is taken",
         "reversed(generations(folder))", "generations(folder)"),
    ),
    *faults("training.checkpoints", "test_storage.py::test_a_damaged_newest_is_put_aside_when_the_run_goes_on",
        ("`best` stays where a kill left it",
         '        point(folder, "best", best)', "        folder.has(best)"),
    ),
    *faults("experiment.resume", RESUMING,
        ("strict resuming looks at the last machine alone",
         "[line for each in before for line in run_folder.changes(each, environment)]",
         "[line for each in before[-1:] for line in run_folder.changes(each, environment)]"),
        ("what was and what is are exchanged",
         "(differ := differences(other, experiment.with_statistics_of(other)))",
         "(differ := differences(experiment.with_statistics_of(other), other))"),
    ),
    # --- networks ---------------------------------------------------------------------------------------------------
    *faults("model.builder", "test_network.py test_receptive.py",
        ("a shortcut's stride is rounded down",
         "(-(-signal.shape[1] // out.shape[1]), -(-signal.shape[2] // out.shape[2]))",
         "(signal.shape[1] // out.shape[1], signal.shape[2] // out.shape[2])"),
        ("a residual sees what its layers see alone",
         "seen_through(Window(), [out, other], out.shape)", "seen_through(Window(), [out], out.shape)"),
        ("a shortcut's conv has a bias before its norm",
         "stride, bias=node.norm is None)", "stride, bias=True)"),
    ),
    *faults("config.blocks", "test_experiment.py::test_blocks_are_expanded_with_parameters_and_defaults "
            "test_experiment.py::test_a_mistake_in_a_block_is_told_once_at_its_definition "
            "test_experiment.py::test_name_and_from_at_a_blocks_use_are_those_of_what_it_becomes "
            "test_detection.py::test_a_shipped_block_can_be_replaced",
        ("a block keeps what it was first given",
         "self._filled(copy(block.layers), given, block.name)", "self._filled(block.layers, given, block.name)"),
        ("`block: value` sets the last parameter",
         "given.put(next(iter(block.parameters)),", "given.put(list(block.parameters)[-1],"),
        ("the blocks that are shipped take the place of the file's own",
         'if "blocks" in tree:\n        expander.define(tree.pop("blocks"), tree.marks["blocks"])',
         'if "blocks" in tree:\n        expander.define(tree.pop("blocks"), tree.marks["blocks"])\n'
         '        expander.define(shipped["blocks"], shipped.marks["blocks"])'),
    ),
    *faults("model.structures", "test_network.py test_receptive.py",
        ("the activation of a residual comes before its sum",
         "self.activation(_run(self.layers, x, outer) + _run(self.shortcut, x, outer))",
         "self.activation(_run(self.layers, x, outer)) + _run(self.shortcut, x, outer)"),
        ("links from within a shortcut are not seen",
         "[node.layers, node.shortcut if isinstance(node.shortcut, list) else []]", "[node.layers]"),
    ),
    *faults("model.receptive_field", "test_receptive.py test_network.py",
        ("a kernel sees a cell more than it has",
         "(window.kernel[d] - 1) * step", "window.kernel[d] * step"),
        ("branches begin where the last of them does",
         "first = min(source.start[d]", "first = max(source.start[d]"),
    ),
    *faults("export", PARITY,
        ("the metric of the artefact is the network's own",
         '("artefact", run))', '("artefact", trained.results))'),
        ("the metric may differ by half a percent",
         "close = 0.5 * 10**-DIGITS", "close = 0.5 * 10**-2"),
        ("the size that a file asks for has width before height",
         "uint8 [batch, {height}, {width}, {channels}]", "uint8 [batch, {width}, {height}, {channels}]"),
    ),
    *faults("export", "export/test_onnx.py",
        ("a picture is unsteady only if noise alters it both ways",
         "return all(trained.task.agree(", "return any(trained.task.agree("),
    ),
    # --- data -------------------------------------------------------------------------------------------------------
    *faults("data.hold_out", "test_splitting.py test_dataset.py",
        ("whatever the seed, the same are held out",
         "order = permutation(seed, 0, len(labels_N))\n    held", "order = permutation(0, 0, len(labels_N))\n    held"),
        ("every class's folds begin at the first",
         "        start += len(members)\n", ""),
        ("small groups are placed first",
         "argsort(descending=True, stable=True)", "argsort(descending=False, stable=True)"),
        ("a rare class is not held out at all",
         "min(max(count, 1), len(members) - 1)", "min(count, len(members) - 1)"),
        ("a set of just enough samples is one of the rare ones",
         "counts[labels] < least", "counts[labels] <= least"),
    ),
    *faults("data.epoch_order", "test_splitting.py",
        ("what does not divide evenly goes to the first classes each epoch",
         "(place + epoch) % classes < count % classes", "place < count % classes"),
        ("samples shown again go by the same number",
         "numbers.append(chosen + cycle * count)", "numbers.append(chosen)"),
        ("a person's pictures come in one order for ever",
         "key(seed, place, cycle), epoch, len(members))].tolist()", "key(seed, place), 0, len(members))].tolist()"),
        ("a picture may come last and then first",
         "next((each for each in waiting if each not in recent), waiting[0])", "waiting[0]"),
    ),
    *faults("experiment.config_differences", RESUMING,
        ("other micro-batches are no other setting",
         '*("data.timeout", "train.timeout",', '*("data.timeout", "train.accumulate", "train.timeout",'),
    ),
    *faults("experiment.config_differences", "test_config_differences.py",
        ("another split is answered with the old numbers",
         '_TRAINED_BY = ("data.augment",', '_TRAINED_BY = ("data.augment", "data.split",'),
    ),
    *faults("data.leakage",
            f"{LEAKS} test_data_commands.py::test_copies_of_a_picture_are_on_one_side_of_a_split_of_ours",
        ("pictures under two labels stay in training",
         "groups = [*found.across, *found.conflicts, *found.torn, *found.shared]",
         "groups = [*found.across, *found.torn, *found.shared]"),
        ("copies are kept together in train alone",
         'names = ["train", *sorted(indexed.held_out)]', 'names = ["train", *sorted(indexed.held_out)[:1]]'),
    ),
    *faults("data.class_names", "test_class_names.py",
        ("the sign of a number is no part of it",
         'return "".join(number.group(1, 2))', "return number.group(2)"),
        ("one class more may be without a picture",
         "if highest >= _most_numbers(len(used)):", "if highest > _most_numbers(len(used)):"),
    ),
    *faults("contracts.objects", "test_batches.py",
        ("objects of the pictures before are given",
         "(self.ends_N1[numbers] - ends[:-1])", "(self.ends_N1[numbers] - ends[1:] + counts - 1)"),
        ("a batch is as wide as its pictures have objects on average",
         "return max(1, int(counts_N.max()))", "return max(1, int(counts_N.float().mean()))"),
    ),
    *faults("data.prepare", LEAKS,
        ("statistics are those of pictures that are left out, too",
         "return _measured(data.image, without_leaks(replace(dataset, notes=tuple(notes)), data.leakage, apart))",
         "return without_leaks(_measured(data.image, replace(dataset, notes=tuple(notes))), data.leakage, apart)"),
        ("other labels are the same data",
         "made.update(target.encode() + values.numpy().tobytes())", "made.update(target.encode())"),
    ),
    *faults("data.duplicates", f"{LEAKS} test_data_commands.py::test_sound_data_passes_with_its_figures",
        ("pictures are near if they are in one of the two ways",
         "(apart <= NEAR_LEVELS) & (apart", "(apart <= NEAR_LEVELS) | (apart"),
        ("what is near goes by the larger contrast",
         "np.minimum(deviation[a], deviation[b])", "np.maximum(deviation[a], deviation[b])"),
        ("pictures without a group are one group",
         "known = np.flatnonzero(columns.group_N >= 0)", "known = np.arange(len(columns.group_N))"),
    ),
    # --- GPUs -------------------------------------------------------------------------------------------------------
    *faults("training.determinism", "cuda/test_cuda_training.py::test_every_layer_repeats_and_is_the_processors",
        ("a cell's last row is left out of its mean",
         "made[cell, start:end] = 1 / (end - start)", "made[cell, start : end - 1] = 1 / (end - start)"),
        ("the edge is reflected as well", "2 * (size - 1) - places", "2 * size - 1 - places"),
        ("of an even number of channels one too many comes before",
         "before = self.size // 2", "before = (self.size + 1) // 2"),
    ),
    *faults("training.determinism", "cuda/test_cuda_training.py::test_settings_of_pytorch_are_as_before",
        ("deterministic kernels are not asked for",
         "torch.use_deterministic_algorithms(wanted)", "torch.use_deterministic_algorithms(False)"),
        ("they stay asked for",
         "torch.use_deterministic_algorithms(before, warn_only=warned)",
         "torch.use_deterministic_algorithms(True)"),
    ),
    *faults("base.device", "cuda/test_cuda_training.py::test_no_step_makes_the_host_wait",
        ("each constant makes the host wait",
         "torch.tensor(values, dtype=dtype).to(device, non_blocking=True)",
         "torch.tensor(values, dtype=dtype).to(device)"),
    ),
    *faults("data.dataset", "cuda/test_cuda_training.py::test_no_step_makes_the_host_wait",
        ("targets make the host wait", "values.to(device, non_blocking=True)", "values.to(device)"),
    ),
    *faults("training.loss_monitor",
            "cuda/test_cuda_training.py::test_what_is_not_finite_stops_a_step_later_is_named_and_never_saved",
        ("a layer is named whose weights the step has spoiled",
         "not all(map(math.isfinite, values[:2]))", "not any(map(math.isfinite, values))"),
    ),
    *faults("tasks.detection.box_losses", "test_box_losses.py tasks/test_detect.py",
        ("boxes that are apart overlap by what lies between them",
         "(wide > 0) & (tall > 0)", "(wide > 0) | (tall > 0)"),
        ("the distance is not measured", "1 - iou + apart / (", "1 - iou + 0 * apart / ("),
        ("the aspect ratio's weight is learned",
         "    with torch.no_grad():\n        weight", "    if True:\n        weight"),
    ),
]
# fmt: on
