"""Plant bugs, one at a time, and see whether the test that is named for each notices.

    python -m tests.mutants                                  # all of them: about 22 minutes of one core's time
    python -m tests.mutants --only resume                    # those whose name has this in it
    python -m tests.mutants --jobs 2 --output docs/mutants.md

Each mutant is a text that stands exactly once in a file, what to put there instead, and a test that must then fail.
It is planted in a copy of the working tree, where that test alone runs. `killed`: the test failed. `SURVIVED`: it
passed, and does not guard what it is named for. `not applicable`: the text is no longer there exactly once, or the
test could not run; tests/test_mutants.py finds that in seconds. Exit code 1 unless all were killed.

Why not mutmut or cosmic-ray: they change every operator, which gives thousands of mutants here, most of them harmless,
while one test that trains takes ten seconds. And what we want to know is not whether each line is tested but whether
learning that is broken in a way that matters is noticed: "no weight decay", "the optimizer's state is lost on resume".
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 240  # a test that takes longer is stopped, and counts as failed
KILLED, SURVIVED, NOT_APPLICABLE = "killed", "SURVIVED", "not applicable"


class Mutant(NamedTuple):
    """A bug: `text`, which stands exactly once in `file`, becomes `planted`; then `test` fails."""

    name: str  # "area: what is wrong"
    file: str
    text: str
    planted: str
    test: str  # as pytest names it, below tests/


STEP = "test_train_step.py::test_five_steps_are_those_of_lerobots_loss_and_torchs_optimizer"
TWO_RANKS = "test_train_step.py::test_five_steps_of_two_ranks_are_the_same"
IN_PARTS = "test_train_step.py::test_five_steps_in_two_parts_are_the_same"
COSINE = "test_train.py::test_the_cosine_curve_point_by_point"
RESUMED = "test_resume.py::test_an_interrupted_run_is_the_same_run[stops0]"
KEPT = "test_init_from.py::test_kept_statistics_outlast_a_resume_and_the_policy"
AVERAGED = "test_averaging.py::test_the_average_is_the_policy_and_training_does_not_notice"
SWEPT = "test_sweep.py::test_three_arms_of_which_one_fails_and_one_is_interrupted"
STATISTICS = "test_statistics.py::test_statistics_are_those_of_all_training_frames[delta]"
FLOORS = "test_statistics.py::test_deviations_have_a_floor"
CHUNKS = "test_samples.py::test_no_action_and_no_chunk_crosses_a_gap_or_an_episode[delta]"
SHORT = "test_samples.py::test_episode_shorter_than_a_chunk"
SEAM = "test_synchronisation.py::test_wrapped_states_and_small_deltas"
SUMMARY = "test_train.py::test_the_summary_errors_are_those_of_the_saved_checkpoint"
MODES = "test_deploy_policy.py::test_modes_are_lerobots_select_action"
ON_DEVICE = "test_feed.py::test_batches_cut_on_the_device_are_the_samples"
STREAM = "test_limiter.py::test_a_stream_within_the_limits_is_passed_on_bit_by_bit"
SILENT = "test_control.py::test_what_falls_silent_stops_the_arm_within_its_limits[camera dies]"
ROS2_HALT = "test_ros2.py::test_a_halt_ends_the_robots_program"
RTDE_FAULT = "test_rtde_robot.py::test_a_fault_while_it_moves_halts_the_arm_for_good"
STOPPED = "test_control.py::test_a_robot_that_stops_by_itself_is_never_moved_again[protective stop]"
PERCENTILES = "test_deploy_policy.py::test_percentiles_are_observed_values"
SCORES = "test_run_dir.py::test_a_checkpoint_that_was_never_written_is_not_the_best"
TURNS = "test_statistics.py::test_a_pose_near_pi_has_one_target_and_its_motion_is_visible"
COMMANDS = "test_deploy_policy.py::test_an_absolute_action_is_commanded_where_the_joint_is"
TAG = "test_osmo_submit.py::test_the_name_of_bags_is_what_they_hold"
UPLOADED = "test_osmo_submit.py::test_bags_are_uploaded_once[storage_url]"
INSPECTED = "test_osmo_submit.py::test_bags_that_training_would_refuse_are_not_uploaded"
FOLLOW = "test_rollout.py::test_commands_follow_deltas_from_the_last_command_and_absolutes_as_they_are"
ATTEMPTS = "test_osmo_ends.py::test_out_of_memory_twice_in_a_row_is_the_end"
GAPS = "test_cutting.py::test_gaps_separate_where_the_recorder_paused[mcap]"
RESTS = "test_cutting.py::test_rests_separate[mcap]"
SIDECAR = "test_cutting.py::test_a_sidecar_separates[mcap]"
ONE_BAG = "test_cut_runs.py::test_one_bag_with_three_demonstrations_holds_one_out"
FEW_FRAMES = "test_cut_runs.py::test_the_summary_of_a_long_episode_looks_at_few_frames"
CHANGED = "test_in_place.py::test_a_bag_that_changes_under_a_run_is_one_line[one bit-mcap]"
SPLIT = "test_train.py::test_training_and_validation_see_their_own_episodes"

MUTANTS = [
    # The train step.
    Mutant("step: no KL in the gradient", "train.py",
           "training.kl_weight * kl_sum / self.effective_batch)", "0 * kl_sum)", STEP),
    Mutant("step: nothing is clipped", "train.py",
           "clip_grad_norm_(self.model.parameters(), training.grad_clip_norm)",
           "clip_grad_norm_(self.model.parameters(), 1e9)", STEP),
    Mutant("step: no weight decay", "train.py", "weight_decay=training.weight_decay,", "weight_decay=0.0,", STEP),
    Mutant("step: the backbone learns at the main rate", "train.py",
           '"lr": training.lr_backbone}', '"lr": training.lr}', STEP),
    Mutant("step: gradients pile up", "train.py", "self.optimizer.zero_grad(set_to_none=True)", "pass", STEP),
    Mutant("step: padded actions count in the loss", "act_model.py", ".abs().masked_fill(is_pad, 0)", ".abs()", STEP),
    Mutant("step: the mean counts padding", "act_model.py",
           "return (~action_is_pad).sum() * actions.shape[-1]",
           "return (action_is_pad >= 0).sum() * actions.shape[-1]", STEP),
    Mutant("step: KL is twice as large", "act_model.py", "kl_sum = -0.5 * (", "kl_sum = -1.0 * (",
           "test_act_model.py::test_kl_is_that_of_two_gaussians"),
    Mutant("step: the VAE sees padded actions", "act_model.py",
           "F.pad(action_is_pad, (2, 0), value=False)", "F.pad(action_is_pad & False, (2, 0), value=False)",
           "test_act_model.py::test_padded_actions_change_nothing"),
    Mutant("step: the latent has no noise", "act_model.py", "* torch.randn_like(mu)", "* 0", STEP),
    Mutant("step: one noise for all steps", "train.py",
           "torch.manual_seed(feed.step_seed(self.cfg.training.seed, self.step, self.world.rank))",
           "torch.manual_seed(feed.step_seed(self.cfg.training.seed, 0, self.world.rank))",
           "test_feed.py::test_every_step_of_every_rank_draws_noise_of_its_own"),
    Mutant("step: all ranks draw the same noise", "train.py",
           "torch.manual_seed(feed.step_seed(self.cfg.training.seed, self.step, self.world.rank))",
           "torch.manual_seed(feed.step_seed(self.cfg.training.seed, self.step, 0))",
           "test_feed.py::test_every_step_of_every_rank_draws_noise_of_its_own"),
    Mutant("step: a step is taken on a loss that is not finite", "train.py",
           "self.optimizer.found_inf.masked_fill_(", "self.optimizer.found_inf.masked_fill(",
           "test_failures.py::test_a_loss_that_is_not_finite_never_reaches_the_weights[1]"),
    Mutant("step: training goes on behind a loss that is not finite", "train.py",
           "self.optimizer.found_inf.masked_fill_(", "self.optimizer.found_inf.zero_().masked_fill_(",
           "test_failures.py::test_a_loss_that_is_not_finite_never_reaches_the_weights[100]"),
    Mutant("step: bf16 is not used", "train.py", "enabled=self.precision != torch.float32", "enabled=False",
           "test_device.py::test_bf16_follows_fp32_and_keeps_weights_and_optimizer_in_fp32"),
    # The step as a CUDA graph.
    Mutant("graph: every repetition sees the first batch", "training/graphs.py",
           "self._batch[name].copy_(values)", "pass", "test_graphs.py::test_repeated_steps_are_the_steps"),
    Mutant("graph: every repetition has the first rate", "training/graphs.py",
           'rate.fill_(group["lr"])', 'self._repeat or rate.fill_(group["lr"])',
           "test_graphs.py::test_repeated_steps_are_the_steps"),
    Mutant("graph: a rate is saved as a tensor", "training/graphs.py",
           'group["lr"], group["capturable"] = lr, was', "pass",
           "test_graphs.py::test_repeated_steps_are_the_steps"),
    # Several ranks.
    Mutant("ranks: gradients are halved", "train.py", "loss = world.size * (l1_sum", "loss = (l1_sum", TWO_RANKS),
    Mutant("ranks: a mean of the ranks' means", "train.py",
           "loss = world.size * (l1_sum / n_valid", "loss = world.size * (l1_sum / (valid * world.size)", TWO_RANKS),
    Mutant("ranks: the batch counts one rank's samples", "train.py",
           "training.batch_size * training.accumulate_steps * world.size",
           "training.batch_size * training.accumulate_steps", TWO_RANKS),
    Mutant("parts: each has a mean of its own", "train.py",
           'valid_elements(batch["action"], batch["action_is_pad"])',
           'valid_elements(batch["action"], batch["action_is_pad"]) / training.accumulate_steps', IN_PARTS),
    Mutant("parts: only the last one counts", "train.py",
           "                loss.backward()\n",
           "                self.optimizer.zero_grad(set_to_none=True)\n                loss.backward()\n", IN_PARTS),
    Mutant("parts: the log has the last one alone", "train.py",
           "functools.reduce(torch.add, terms)", "terms[-1]",
           "test_ddp.py::test_two_ranks_that_round_gradients_and_take_two_parts"),
    Mutant("parts: gradients travel after each", "training/ranks.py",
           "isinstance(model, DistributedDataParallel) and not now", "False",
           "test_ddp.py::test_only_the_last_part_s_gradients_travel"),
    Mutant("ranks: constant buffers are sent in every step", "training/ranks.py",
           "ddp.broadcast_buffers = False", "pass", "test_ddp.py::test_gradients_alone_travel[none]"),
    Mutant("ranks: gradients are rounded unasked", "training/ranks.py",
           'if compression == "bf16":', "if compression:", "test_ddp.py::test_gradients_alone_travel[none]"),
    Mutant("ranks: all see the same samples", "training/feed.py",
           "first, size = self.start + self.rank, ", "first, size = self.start, ",
           "test_feed.py::test_ranks_share_what_one_process_would_see"),
    Mutant("ranks: a rank goes on while another still reads", "training/ranks.py",
           "        self._wait_for([f\"{what}-rank{rank}\" for rank in range(self.size)])\n", "",
           "test_ranks.py::test_the_first_of_each_node_goes_first_and_none_goes_on_before_all_are_done"),
    Mutant("warm: episodes of other settings are taken", "rosbag_dataset/warm.py",
           "if field.name not in NOT_OF_THE_DATA:", 'if field.name == "fps":',
           "test_warm.py::test_every_setting_is_in_the_key"),
    Mutant("warm: the order of cameras is lost", "rosbag_dataset/warm.py",
           "repr(getattr(settings, field.name))", "str(sorted(repr(getattr(settings, field.name))))",
           "test_warm.py::test_the_order_of_cameras_is_in_the_key"),
    Mutant("warm: an entry that was changed is not noticed", "rosbag_dataset/warm.py",
           "stamp.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])", "stamp.append([file.name])",
           "test_warm.py::test_what_changes_an_episode_makes_them_again"),
    Mutant("warm: another sidecar is not noticed", "rosbag_dataset/warm.py",
           "parts.append(sidecar_path(bag).read_bytes().hex())", "pass",
           "test_warm.py::test_a_cut_recording_is_kept_as_it_was_cut"),
    Mutant("warm: a bag is known by its size and time", "rosbag_dataset/bags.py",
           "s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino", "s.st_size, s.st_mtime_ns, s.st_ino",
           "test_warm.py::test_a_bag_is_known_only_while_its_files_are_the_same"),
    Mutant("warm: an episode has its neighbour's frames", "rosbag_dataset/warm.py",
           "slice(*self.starts[number : number + 2])", "slice(*(s + 1 for s in self.starts[number : number + 2]))",
           "test_warm.py::test_a_warm_start_does_nothing_again"),
    Mutant("ranks: a failure is not told to the others", "train.py",
           "            claim_failure(world)\n", "            pass\n",
           "test_failures.py::test_an_error_that_nobody_foresaw_ends_the_run[2-0]"),
    # The order of samples, and what becomes of them.
    Mutant("samples: one order for all epochs", "training/feed.py",
           'step_seed(self.seed, epoch, r, "sample order")', 'step_seed(self.seed, 0, r, "sample order")',
           "test_feed.py::test_every_epoch_is_a_permutation_of_its_own"),
    Mutant("samples: an older run's epochs have one order", "training/feed.py",
           "manual_seed(self.seed + epoch)", "manual_seed(self.seed)",
           "test_feed.py::test_every_epoch_is_a_permutation_of_its_own"),
    Mutant("samples: some come twice, others never", "training/feed.py",
           "(left + _mixed(right ^ key) % base) % base", "(left ^ _mixed(right ^ key)) % base",
           "test_feed.py::test_every_epoch_is_a_permutation_of_its_own"),
    Mutant("samples: the order is hardly mixed", "training/feed.py",
           "ROUNDS, BLOCK = 8, 4096", "ROUNDS, BLOCK = 2, 4096",
           "test_feed.py::test_the_order_is_as_good_as_chance"),
    Mutant("resume: an older run goes on in another order", "training/identity.py",
           'return RANDPERM_ORDER if was.get("sample order", 1) <= RANDPERM_ORDER else SAMPLE_ORDER',
           "return SAMPLE_ORDER", "test_feed.py::test_a_run_keeps_the_order_that_it_began_with"),
    Mutant("samples: frames take nearly all of the GPU", "training/feed.py", "SHARE = 0.5", "SHARE = 0.95",
           "test_feed.py::test_frames_stay_on_the_device_only_when_they_fit"),
    Mutant("samples: red and blue are swapped in training", "training/feed.py",
           "batch[name].permute(0, 3, 1, 2).float()", "batch[name].flip(-1).permute(0, 3, 1, 2).float()", SUMMARY),
    Mutant("samples: images are augmented with another's amounts", "training/augment.py",
           "offset = (torch.rand(batch_size, generator=generator) * 2 - 1) * limit",
           "offset = (torch.rand(1, generator=generator).expand(batch_size) * 2 - 1) * limit",
           "test_augment.py::test_draws_are_uniform_within_their_strengths_and_repeat_with_the_seed"),
    Mutant("samples: no augmentation", "training/feed.py",
           "augment.apply(image, amounts[i]) if amounts else image", "image",
           "test_augment.py::test_augmentation_changes_training_images_only"),
    # The schedule.
    Mutant("schedule: the first step has rate 0", "train.py",
           "return (step + 1) / training.warmup_steps", "return step / training.warmup_steps", COSINE),
    Mutant("schedule: min_lr is never reached", "train.py",
           "max(1, training.steps - 1 - training.warmup_steps)", "max(1, training.steps - training.warmup_steps)",
           COSINE),
    Mutant("schedule: min_lr is ignored", "train.py",
           "min(1.0, training.min_lr / peak_lr) if peak_lr else 1.0", "0.0", COSINE),
    Mutant("schedule: the backbone ends at another rate", "train.py",
           "peak * lr_factor(step, training, peak)", "peak * lr_factor(step, training, training.lr)",
           "test_train.py::test_both_groups_end_at_min_lr"),
    Mutant("schedule: the rate rises again behind the end", "train.py", "min(1.0, progress)", "progress", COSINE),
    Mutant("schedule: it stands still", "train.py",
           "learning_rates(self.step, self.cfg.training)", "learning_rates(0, self.cfg.training)", STEP),
    Mutant("schedule: the rate of the next step is logged", "train.py",
           "self.lr = rates[0]", "self.lr = learning_rates(self.step + 1, self.cfg.training)[0]",
           "test_train.py::test_the_logged_learning_rate_is_the_one_used"),
    Mutant("schedule: the backbone's rate is logged", "train.py",
           "self.lr = rates[0]", "self.lr = rates[1]",
           "test_train.py::test_the_logged_learning_rate_is_the_one_used"),
    # Resuming.
    Mutant("resume: the optimizer's state is lost", "train.py",
           'self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})',
           "pass", RESUMED),
    Mutant("resume: the weights are lost", "train.py", 'self.model.load_state_dict(state["model"])', "pass", RESUMED),
    Mutant("resume: the place in the data is lost", "train.py",
           'state["step"], state["samples_seen"]', 'state["step"], 0', RESUMED),
    Mutant("resume: the half-full window of the log is lost", "train.py",
           'self.window.copy_(state["window"])', "pass",
           "test_resume.py::test_resume_between_log_lines_keeps_the_half_full_window"),
    Mutant("resume: lines that are written again stay in metrics.jsonl", "training/metrics.py",
           "        cut_metrics(path, step)\n", "",
           "test_resume.py::test_metrics_are_cut_back_to_the_checkpoint"),
    Mutant("resume: another run's checkpoint is taken", "train.py",
           'identity.check_unchanged(state["fingerprint"], self.fingerprint, self.episodes, checkpoint)', "pass",
           "test_resume.py::test_a_changed_model_or_changed_data_is_refused[change2-words2]"),
    Mutant("resume: another fps is not noticed", "training/identity.py",
           'keys = ("fps", "max_offset_ms",', 'keys = ("max_offset_ms",',
           "test_resume.py::test_a_changed_model_or_changed_data_is_refused[change1-words1]"),
    Mutant("resume: a new weight decay is ignored", "train.py",
           'self.optimizer.state_dict() | {"state": state["optimizer"]["state"]}', 'state["optimizer"]',
           "test_resume.py::test_another_learning_rate_counts_from_there_and_is_said"),
    Mutant("resume: a validation that a stop left out stays out", "train.py",
           'self.validation_due = checkpoint if state["validation_due"] else None', "self.validation_due = None",
           "test_resume.py::test_a_validation_that_a_stop_left_out_is_made_up_for"),
    Mutant("resume: the oldest checkpoint is the newest", "lerobot_checkpoint/directory.py",
           "for checkpoint in reversed(list_checkpoints(output_dir)):",
           "for checkpoint in list_checkpoints(output_dir):",
           "test_checkpoint_directory.py::test_newest_skips_damage_and_says_so"),
    Mutant("resume: a run without a whole checkpoint starts over", "training/run_dir.py",
           "if newest is None and passed_over:", "if False:",
           "test_run_dir.py::test_no_whole_checkpoint_is_no_fresh_start"),
    # Beginning with another policy, averaging the weights.
    Mutant("begin: no weights are taken", "training/init_from.py",
           "model.load_state_dict({**model.state_dict(), **self.weights})", "pass",
           "test_init_from.py::test_a_run_on_other_bags_begins_with_these_weights"),
    Mutant("begin: statistics are always kept", "training/init_from.py", "if keep and key in", "if key in",
           "test_init_from.py::test_a_run_on_other_bags_begins_with_these_weights"),
    Mutant("begin: a resumed run measures statistics anew", "training/init_from.py",
           "stats={key: stats[key] for key in kept}, recorded", "stats={}, recorded", KEPT),
    Mutant("begin: angles turn although statistics are kept", "training/init_from.py",
           "angle_reference_rad=reference if STATE in kept else None", "angle_reference_rad=None", KEPT),
    Mutant("begin: a camera more is not noticed", "training/init_from.py",
           "*actions, *cameras, *network]", "*actions, *network]",
           "test_init_from.py::test_what_does_not_fit_is_refused_by_name[a camera more]"),
    Mutant("begin: weights of other actions are taken for these", "training/init_from.py",
           "(OF_ACTIONS if other_actions else ())", "()",
           "test_init_from.py::test_in_part_what_fits_is_loaded_and_the_rest_is_listed"),
    Mutant("begin: what was trained on counts as unseen", "training/init_from.py",
           "in (None, e.content_hash)]", "in ()]",
           "test_init_from.py::test_what_the_policy_was_trained_on_is_no_new_recording"),
    Mutant("average: it is not the policy", "train.py",
           "model_state=self.average.policy.state_dict()", "model_state=self.model.state_dict()", AVERAGED),
    Mutant("average: it is not what is validated", "train.py",
           "policy, batch_size = self.average.policy,", "policy, batch_size = self.model,", AVERAGED),
    Mutant("average: it does not warm up", "training/averaging.py",
           "min(self.decay, 1 - step**-WARM_UP_POWER)", "self.decay",
           "test_averaging.py::test_the_average_is_the_one_by_hand"),
    Mutant("average: a resumed run trains the average", "training/averaging.py",
           "state.get(OWN_WEIGHTS, self.model.state_dict())", "self.model.state_dict()",
           "test_averaging.py::test_a_resumed_average_is_the_same[2]"),
    Mutant("average: a resumed one begins anew", "training/averaging.py",
           "        self.policy.load_state_dict(self.model.state_dict())\n", "        pass\n",
           "test_averaging.py::test_a_resumed_average_is_the_same[2]"),
    # Sweeps.
    Mutant("sweep: what is finished is run again", "sweep.py",
           "if command is None or done.has(run, stage, command):", "if command is None:", SWEPT),
    Mutant("sweep: an arm that fails is not told by the exit code", "sweep.py",
           "return 1 if failed else 0", "return 0", SWEPT),
    Mutant("sweep: a signal ends an arm before it has saved", "sweep.py",
           "run.process.terminate()", "run.process.kill()", SWEPT),
    Mutant("sweep: the least success comes first", "sweep.py", "(-self.success[0] if", "(self.success[0] if",
           "test_sweep.py::test_the_order_is_that_of_success_and_intervals_are_over_seeds"),
    # `best` and `last`.
    Mutant("best: it is the worst", "lerobot_checkpoint/directory.py",
           "return min(scored, key=", "return max(scored, key=", SCORES),
    Mutant("best: the link is never made", "lerobot_checkpoint/saving.py",
           "                link_best(output_dir)\n", "",
           "test_train.py::test_whole_episodes_are_held_out_and_recorded"),
    Mutant("best: no checkpoint has its score", "lerobot_checkpoint/saving.py",
           '{"step": step, SCORE: score, ', '{"step": step, SCORE: None, ',
           "test_train.py::test_whole_episodes_are_held_out_and_recorded"),
    Mutant("best: a kill between the links leaves it wrong", "training/run_dir.py",
           "        lerobot_checkpoint.link_best(output_dir)  # a kill may have come between the two links\n",
           "        pass\n", "test_run_dir.py::test_best_is_found_again_after_a_kill_between_the_links"),
    Mutant("best: that of an older run is lost on resume", "training/run_dir.py",
           'if math.isfinite(state.get("best_l1", math.inf)) and', "if False and",
           "test_run_dir.py::test_a_run_from_before_scores_keeps_its_best"),
    Mutant("best: it is pruned", "lerobot_checkpoint/directory.py",
           " if path.resolve() not in linked]", "]",
           "test_checkpoint_directory.py::test_prune_never_removes_what_links_point_at"),
    Mutant("last: it stays on the first checkpoint", "lerobot_checkpoint/saving.py",
           '    point_link(output_dir, "last", final)\n',
           '    (output_dir / "last").exists() or point_link(output_dir, "last", final)\n',
           "test_train.py::test_the_checkpoint_is_the_seven_files_beside_the_training_state"),
    # Validation and the log.
    Mutant("validation: with dropout and latent noise", "training/validation.py",
           "    model.eval()\n    with torch.inference_mode(), full", "    with torch.inference_mode(), full", SPLIT),
    Mutant("validation: products are rounded to TF32", "act_model.py",
           "matmul.allow_tf32 = cudnn.allow_tf32 = False", "cudnn.allow_tf32 = False",
           "test_validation.py::test_only_training_rounds_products_to_tf32"),
    Mutant("validation: the model stays in eval mode", "training/validation.py",
           "    model.train()\n    l1_sum, n_valid", "    l1_sum, n_valid", RESUMED),
    Mutant("validation: the first samples stand for all", "training/validation.py",
           "[i * len(held_out) // wanted for i in range(wanted)]", "list(range(wanted))",
           "test_validation.py::test_a_validation_samples_all_held_out_episodes"),
    Mutant("log: losses are sums, not means", "train.py", "(self.window / self.window[4])", "(self.window / 1)",
           "test_metrics.py::test_a_line_is_the_mean_of_the_steps_since_the_last_one"),
    Mutant("log: the window is never emptied", "train.py", "        self.window.zero_()\n", "",
           "test_metrics.py::test_a_line_is_the_mean_of_the_steps_since_the_last_one"),
    Mutant("log: half a line stays on a full disk", "training/metrics.py",
           "                file.truncate(size)\n", "                pass\n",
           "test_metrics.py::test_a_line_that_the_disk_has_no_room_for_is_not_there_at_all"),
    # Which episodes are for what.
    Mutant("split: held-out episodes are trained on", "train.py",
           "self.dataset = ChunkDataset(self.train_episodes,", "self.dataset = ChunkDataset(self.episodes,", SPLIT),
    Mutant("split: training episodes are validated", "train.py",
           "self.held_out_dataset = ChunkDataset(self.held_out,",
           "self.held_out_dataset = ChunkDataset(self.train_episodes,", SPLIT),
    Mutant("split: the seed does not count", "training/identity.py",
           "training.val_fraction, training.seed,", "training.val_fraction, 42,", SPLIT),
    Mutant("split: a resumed run splits anew", "training/identity.py",
           "if was is None:\n        return split_episodes", "if was is not None:\n        return split_episodes",
           "test_resume.py::test_a_run_from_before_the_split_by_hash_goes_on_with_its_own_split"),
    Mutant("split: one recording more moves the others", "rosbag_dataset/episodes.py",
           'f"{seed} {group}".encode()', 'f"{seed} {group} {len(episodes)}".encode()',
           "test_episodes.py::test_new_recordings_move_no_old_one_to_the_other_side"),
    Mutant("split: nothing is left to train on", "rosbag_dataset/episodes.py",
           "groups[: min(count, len(groups) - 1)]", "groups[:count]",
           "test_episodes.py::test_how_many_are_held_out"),
    Mutant("split: copies are told by their names", "rosbag_dataset/episodes.py",
           "{e.name: e.recording_hash or e.name for", "{e.name: e.name for",
           "test_episodes.py::test_copies_stay_on_one_side"),
    Mutant("split: a copy in another storage format is another recording", "rosbag_dataset/episodes.py",
           "episode.recording_hash = entry, content_hash, recorded",
           "episode.recording_hash = entry, content_hash, content_hash",
           "test_episodes.py::test_copies_are_reported_and_kept_together"),
    Mutant("split: statistics are of all episodes", "train.py",
           "compute_stats(self.train_episodes,", "compute_stats(self.episodes,",
           "test_train.py::test_statistics_come_from_training_episodes_only"),
    Mutant("split: the contract names the wrong side", "training/identity.py",
           '"held_out_episodes": [e.name for e in held_out],', '"held_out_episodes": [e.name for e in train],',
           "test_train.py::test_whole_episodes_are_held_out_and_recorded"),
    Mutant("split: what has no action is held out", "rosbag_dataset/episodes.py",
           "for e in episodes if e.has_action}", "for e in episodes}",
           "test_cutting.py::test_what_has_no_action_is_never_held_out"),
    Mutant("split: episodes of one recording are on both sides", "rosbag_dataset/episodes.py",
           'if only_one or hold_out == "episode":', "if True:",
           "test_cutting.py::test_a_recordings_episodes_are_on_one_side"),
    Mutant("split: what a copy shows as well is on both sides", "rosbag_dataset/episodes.py",
           "if episode.time_ns[0] > until_ns:", "if True:",
           "test_cutting.py::test_a_recordings_episodes_are_on_one_side"),
    Mutant("split: nothing of the only recording is held out", "rosbag_dataset/episodes.py",
           "(3 if only_one else 5)", "5", "test_cutting.py::test_the_only_recording_is_divided"),
    # Several episodes in one recording.
    Mutant("episodes: a pause separates nothing", "rosbag_dataset/cutting.py",
           "np.diff(times) > settings.episode_pause_s * 1e9", "np.diff(times) > 1e18", GAPS),
    Mutant("episodes: a camera that drops out separates", "rosbag_dataset/cutting.py",
           "np.concatenate([recording.joint_time_ns, *recording.camera_time_ns.values()])",
           "np.concatenate([*recording.camera_time_ns.values()])", GAPS),
    Mutant("episodes: they are numbered", "rosbag_dataset/cutting.py",
           'f"{bag.name}@{start_s:09.3f}s"', 'f"{bag.name}@{len(episodes)}"', GAPS),
    Mutant("episodes: the rest behind a motion is lost", "rosbag_dataset/cutting.py",
           "motion_end + pause_ns + 1", "motion_end + 1", RESTS),
    Mutant("episodes: the limit moves their starts", "rosbag_dataset/cutting.py",
           "spans.append(Span(start, begin,", "spans.append(Span(start - pause_ns, begin,", RESTS),
    Mutant("episodes: a marker that is repeated starts another", "rosbag_dataset/cutting.py",
           "np.append(True, values[1:] != values[:-1])", "np.append(True, values[1:] == values[1:])",
           "test_cutting.py::test_markers_separate[Bool]"),
    Mutant("episodes: the last one that never stops is lost", "rosbag_dataset/cutting.py",
           "ends = np.append(times[changes[1:]], last_ns + 1)", "ends = np.append(times[changes[1:]], times[-1])",
           "test_cutting.py::test_markers_separate[Bool]"),
    Mutant("episodes: failures are trained on", "rosbag_dataset/cutting.py",
           'if span.labels.get("success") is False and not settings.keep_failures:', "if False:", SIDECAR),
    Mutant("episodes: a part shows the recording's first images", "rosbag_dataset/cutting.py",
           "{camera: images[camera][i] for camera, i in", "{camera: i for camera, i in", SIDECAR),
    Mutant("episodes: another end is the same episode", "rosbag_dataset/episodes.py",
           'episode.content_hash += f" {episode.time_ns[0]}..{episode.time_ns[-1]}"', "pass", SIDECAR),
    Mutant("export: a rerun writes everything again", "rosbag_dataset/exporting.py",
           "for number, record in enumerate(records) if not record.exists()]", "for number, _ in enumerate(records)]",
           "test_exporting.py::test_a_killed_process_leaves_no_dataset_and_a_rerun_goes_on"),
    Mutant("export: SIGTERM ends it without a word", "rosbag_dataset/exporting.py",
           "signal.signal(signal.SIGTERM, signal.default_int_handler)", "signal.signal(signal.SIGTERM, signal.SIG_DFL)",
           "test_exporting.py::test_a_stop_is_one_line"),
    Mutant("lerobot: parts of a recording are on both sides", "rosbag_dataset/episodes.py",
           "bag.part_of or (episode.bag, episode.recording_hash)", "(episode.bag, episode.recording_hash)",
           "test_recordings.py::test_parts_of_one_recording_are_on_one_side"),
    Mutant("lerobot: changes per frame are taken for positions", "lerobot_dataset/recordings.py",
           'if source.action_mode == "delta":', "if False:",
           "test_recordings.py::test_a_dataset_of_changes_gives_the_same_chunks"),
    Mutant("episodes: entries that overlap pass", "rosbag_dataset/sidecar.py",
           "if after.start_s < before.stop_s:", "if False:",
           "test_cutting.py::test_a_faulty_sidecar_is_one_line[overlap]"),
    Mutant("episodes: what is outside the recording passes", "rosbag_dataset/cutting.py",
           "if entry.stop_s > length_s + 1 / settings.fps:", "if False:",
           "test_cutting.py::test_a_faulty_sidecar_is_one_line[outside]"),
    Mutant("episodes: the end is cut off with the rest", "rosbag_dataset/cutting.py",
           "Span(span.start_ns, begin_ns, span.end_ns)", "Span(span.start_ns, begin_ns, span.end_ns - 10**9)",
           "test_cutting.py::test_the_rest_at_the_start_is_cut_and_the_end_is_kept[bag]"),
    Mutant("episodes: none is too short", "rosbag_dataset/cutting.py",
           "< settings.min_episode_s:", "< 0:", "test_cutting.py::test_short_episodes_are_left_out_when_asked"),
    Mutant("episodes: frames on the device are counted for each part", "rosbag_dataset/samples.py",
           "first_of = dict(zip(owners, firsts, strict=False))",
           "first_of = {e.entry or e.name: i * firsts[-1] for i, e in enumerate(self.episodes)}",
           "test_cutting.py::test_parts_share_the_frames_of_their_recording"),
    Mutant("episodes: pixels of held-out parts are in the statistics", "rosbag_dataset/statistics.py",
           "slice(None) if episode.whole else", "slice(None) if True else",
           "test_cutting.py::test_image_statistics_are_of_the_frames_that_a_part_shows"),
    Mutant("episodes: other markers come from the cache", "rosbag_dataset/cache.py",
           '        parts["episode_marker_topic"] = settings.episode_marker_topic\n', "        pass\n",
           "test_cache.py::test_episode_markers_are_in_the_key_only_where_they_are_read"),
    Mutant("episodes: the evaluation takes a bag for one", "deploy/ur10e_deploy/sources.py",
           'if self._settings.episodes != "bag":', "if False:", ONE_BAG),
    Mutant("episodes: a run resumes however it was cut", "training/identity.py",
           'value for name, value in cut_settings(settings["data"]).items()}',
           'value for name, value in ()}', ONE_BAG),
    Mutant("episodes: a run from before they were cut does not resume", "training/identity.py",
           "differences(BEFORE_CUTTING | was, now)", "differences(was, now)",
           "test_cut_runs.py::test_a_run_from_before_episodes_were_cut_goes_on"),
    # The summary.
    Mutant("summary: an episode's first frames stand for all", "training/summary.py",
           "np.arange(SUMMARY_FRAMES) * count // SUMMARY_FRAMES", "np.arange(SUMMARY_FRAMES)", FEW_FRAMES),
    Mutant("summary: it looks at all frames", "training/summary.py",
           "if count <= SUMMARY_FRAMES:", "if True:", FEW_FRAMES),
    Mutant("summary: it is deaf to signals", "training/summary.py",
           "if name := stop_request():", 'if name := "":',
           "test_cut_runs.py::test_a_signal_during_the_summary_ends_it"),
    # Pictures in the bags.
    Mutant("in place: another picture in its place is trained on", "rosbag_dataset/in_place.py",
           " or checksum(data) != place.checksum:", ":", CHANGED),
    Mutant("in place: some bits are in no checksum", "rosbag_dataset/in_place.py",
           "(2 * np.arange(1024, dtype=np.uint64) + 1)", "(2 * np.arange(1024, dtype=np.uint64))",
           "test_in_place.py::test_a_checksum_notices_any_bit_and_any_order"),
    Mutant("in place: the picture before is shown", "rosbag_dataset/in_place.py",
           "PLACE.size, image * PLACE.size)", "PLACE.size, max(0, image - 1) * PLACE.size)",
           "test_in_place.py::test_samples_are_equal_bit_by_bit[raw-mcap]"),
    Mutant("in place: files stay open", "rosbag_dataset/in_place.py",
           "if len(self._open) >= MAX_OPEN_FILES:", "if False:",
           "test_in_place.py::test_few_files_are_open_and_none_is_mapped"),
    Mutant("in place: a copy that is there is not used", "rosbag_dataset/cache.py",
           '"auto": (key, index_key(key))}', '"auto": (index_key(key),)}',
           "test_in_place.py::test_a_copy_that_is_there_is_used"),
    Mutant("in place: what is slow to decode stays in the bags", "rosbag_dataset/in_place.py",
           "if cpu_ms > MAX_CPU_MS:", "if False:",
           "test_in_place.py::test_auto_says_what_a_copy_would_take_and_what_it_measured"),
    Mutant("in place: a damaged index passes for a whole one", "rosbag_dataset/cache.py",
           "entry / places_file(camera), PLACE.size", "entry / places_file(camera), 1",
           "test_in_place.py::test_a_damaged_index_is_made_again[cut]"),
    Mutant("in place: the line of a worker comes with its traceback", "training/failures.py",
           "return said_by_worker(str(error))", "return str(error)",
           "test_in_place.py::test_the_line_of_a_loaders_process_is_one_line"),
    # Statistics.
    Mutant("statistics: of relative actions only the first counts", "rosbag_dataset/statistics.py",
           "range(1, min(chunk_size, count) + 1)", "range(1, 2)",
           "test_statistics.py::test_statistics_are_those_of_all_training_frames[relative]"),
    Mutant("synchronisation: labels lie on a line across a gap of the joints", "rosbag_dataset/synchronisation.py",
           "~np.any([_in_gap(s, ticks, settings) for s in joint_streams], axis=0)", "True",
           "test_synchronisation.py::test_no_label_lies_across_a_gap_of_the_joints[linear]"),
    Mutant("log: a run that diverges says nothing", "training/metrics.py",
           'self._say(f"warning: {note}")', "pass",
           "test_metrics.py::test_a_resumed_run_does_not_say_it_again"),
    Mutant("log: the wall clock stands still while saving", "training/metrics.py",
           "return steps / training_s, steps / wall_s,", "return steps / training_s, steps / training_s,",
           "test_metrics.py::test_the_wall_clock_counts_saving_and_validation"),
    Mutant("statistics: deviations between episodes are left out", "rosbag_dataset/statistics.py",
           "shift**2 * (a[0] * b[0] / n)", "0 * shift", STATISTICS),
    Mutant("statistics: a short episode counts like a long one", "rosbag_dataset/statistics.py",
           "a[1] + shift * (b[0] / n)", "a[1] + shift * 0.5", STATISTICS),
    Mutant("statistics: frames without an action count as zeros", "rosbag_dataset/statistics.py",
           "_moments(episode.action[has_action])", "_moments(episode.action)", STATISTICS),
    Mutant("statistics: a joint that never moves has no floor", "rosbag_dataset/statistics.py",
           '"std": np.maximum(std, floor)', '"std": std', FLOORS),
    Mutant("statistics: black images have no floor", "rosbag_dataset/statistics.py",
           "np.maximum(np.sqrt(moments[2] / moments[0]), 1 / 255)", "np.sqrt(moments[2] / moments[0])", FLOORS),
    Mutant("statistics: ImageNet's colours are reversed", "rosbag_dataset/statistics.py",
           "(0.485, 0.456, 0.406)", "(0.406, 0.456, 0.485)", "test_statistics.py::test_imagenet_statistics"),
    # Synchronisation.
    Mutant("synchronisation: the farther image is shown", "rosbag_dataset/synchronisation.py",
           "<= np.abs(times_ns[right] - ticks_ns), left, right)", "> np.abs(times_ns[right] - ticks_ns), left, right)",
           "test_synchronisation.py::test_nearest_index"),
    Mutant("synchronisation: of two equal stamps the earlier counts", "rosbag_dataset/synchronisation.py",
           "np.append(recorded_ns[order[1:]] != recorded_ns[order[:-1]], True)",
           "np.append(True, recorded_ns[order[1:]] != recorded_ns[order[:-1]])",
           "test_synchronisation.py::test_equal_stamps"),
    Mutant("synchronisation: the grid starts between images", "rosbag_dataset/synchronisation.py",
           "begin = first_camera[np.searchsorted(first_camera, begin)]", "begin = begin + 0",
           "test_synchronisation.py::test_the_first_camera_anchors_the_grid"),
    Mutant("synchronisation: the last frame is lost to rounding", "rosbag_dataset/synchronisation.py",
           "/ tick_ns + 1e-6) + 1", "/ tick_ns) + 1",
           "test_synchronisation.py::test_steady_camera_gives_each_image_once"),
    Mutant("synchronisation: images keep the file's order", "rosbag_dataset/synchronisation.py",
           "{c: camera_order[c][i[kept]]", "{c: i[kept]",
           "test_synchronisation.py::test_order_in_the_file_does_not_matter[sqlite3]"),
    Mutant("synchronisation: a segment lacks its first frame", "rosbag_dataset/synchronisation.py",
           "(kept_so_far[a] - 1, kept_so_far[b - 1])", "(kept_so_far[a], kept_so_far[b - 1])",
           "test_synchronisation.py::test_gap_drops_frames_and_cuts[camera]"),
    Mutant("synchronisation: joints are taken as they stand in the message", "rosbag_dataset/topics.py",
           "[names.index(joint_names[j]) for j in ours]", "list(range(len(ours)))",
           "test_topics.py::test_joints_by_name_in_every_message"),
    Mutant("synchronisation: positions in degrees are taken for rad", "rosbag_dataset/synchronisation.py",
           "if far[at] <= MAX_UR_RAD:", "if far[at] <= 1e9:",
           "test_synchronisation.py::test_positions_in_degrees[-400.0]"),
    Mutant("synchronisation: a clock that is set back is not seen in an mcap", "rosbag_dataset/storage.py",
           "    module.sorted = lambda found, key=None: found if key else sorted(found)\n", "",
           "test_synchronisation.py::test_a_clock_that_is_set_back[mcap]"),
    Mutant("synchronisation: files in a wrong order pass for a step of the clock", "rosbag_dataset/synchronisation.py",
           "order = np.argsort(first, kind=\"stable\")", "order = np.arange(len(first))",
           "test_synchronisation.py::test_messages_that_are_late_are_put_in_order[files in a wrong order]"),
    Mutant("synchronisation: an action leads across a jump of a joint", "rosbag_dataset/synchronisation.py",
           "at[a : b + 1] = True", "at[a:b] = True",
           "test_synchronisation.py::test_a_jump_of_a_joint_is_cut_out[teleport-delta]"),
    Mutant("synchronisation: a publisher's gap counts only if all have one", "rosbag_dataset/synchronisation.py",
           "~np.any([_in_gap(", "~np.all([_in_gap(",
           "test_synchronisation.py::test_a_gap_of_one_joint_drops_the_frames_in_it[sqlite3]"),
    Mutant("synchronisation: samples of another publisher at the same time are lost", "rosbag_dataset/reading.py",
           "if row is None:", "if row is None or joint_times and joint_times[-1] == receive_ns:",
           "test_synchronisation.py::test_arm_and_gripper_on_one_topic[sqlite3]"),
    Mutant("synchronisation: a frame shows the image before", "rosbag_dataset/samples.py",
           "image = episode.image_index[camera][t]", "image = episode.image_index[camera][max(0, t - 1)]",
           "test_samples.py::test_random_access_equals_the_source"),
    Mutant("synchronisation: bgr8 is read as rgb8", "rosbag_dataset/images.py",
           '"bgr8": ("u1", 3, lambda a: cv2.cvtColor(a, cv2.COLOR_BGR2RGB)),', '"bgr8": ("u1", 3, lambda a: a),',
           "test_images.py::test_raw_encodings"),
    Mutant("topics: one topic is proposed for two cameras", "rosbag_dataset/topics.py",
           " | {*instead.values()}", "",
           "test_topics.py::test_settings_for_several_cameras"),
    Mutant("topics: one of a type that does not fit is offered", "rosbag_dataset/topics.py",
           "if (v[0] <= allowed or not allowed) and v[1] and t not in others", "if t not in others",
           "test_topics.py::test_all_settings_that_do_not_fit_are_one_message"),
    Mutant("faults: a camera without noise is frozen when the arm rests", "rosbag_dataset/faults.py",
           "_turned(joint_rad[order[begin:end]]) > FROZEN_RAD", "True",
           "test_faults.py::test_equal_pictures_of_an_arm_that_rests"),
    Mutant("faults: a scene that stands still is torn", "rosbag_dataset/faults.py",
           " > TORN_LEVELS", " >= 0",
           "test_faults.py::test_pictures_that_are_right"),
    Mutant("faults: how late a camera is, is not measured against the joints", "rosbag_dataset/synchronisation.py",
           "delays[t] - delays[settings.joint_topic]", "delays[t]",
           "test_faults.py::test_a_camera_that_is_late"),
    Mutant("synchronisation: a recording that is hardly used is taken", "rosbag_dataset/synchronisation.py",
           "if used_s < settings.min_used_share * recorded_s:", "if False:",
           "test_synchronisation.py::test_a_camera_that_dies_early"),
    Mutant("video: pictures that build on a damaged one are taken", "rosbag_dataset/video.py",
           "(self._whole or picture.key_frame) and not picture.is_corrupt", "True",
           "test_video.py::test_a_packet_that_does_not_decode"),
    Mutant("video: a picture has the time of the message after which it came out", "rosbag_dataset/video.py",
           "number, last = int(picture.pts),", "number, last = len(self._times_ns) - 1,",
           "test_video.py::test_b_frames_by_their_stamps"),
    Mutant("video: B frames are paired with times in the order of the messages", "rosbag_dataset/video.py",
           "if number < last and late_ns > 0:", "if False:",
           "test_video.py::test_b_frames_by_their_stamps"),
    Mutant("video: pictures that build on a lost one are taken", "rosbag_dataset/video.py",
           "missing |= number not in (self._last, (self._last + 1) % self._modulus)", "pass",
           "test_video.py::test_a_packet_that_was_lost[h264]"),
    Mutant("video: parameter sets alone count as damage", "rosbag_dataset/video.py",
           "self._whole &= not damaged_without_picture", "self._whole = False",
           "test_video.py::test_messages_with_no_picture_and_with_two"),
    Mutant("video: a message may ask for any number of pictures", "rosbag_dataset/video.py",
           "MAX_PICTURES, MAX_UNITS = 16, 4096", "MAX_PICTURES, MAX_UNITS = 1 << 30, 1 << 30",
           "test_video.py::test_bad_video"),
    Mutant("video: a picture may be of any size", "rosbag_dataset/video.py",
           "if size[0] * size[1] > MAX_PIXELS:", "if False:",
           "test_video.py::test_video_of_too_many_pixels"),
    Mutant("synchronisation: frames of another size come from the cache", "rosbag_dataset/cache.py",
           '        "image_resize": settings.image_resize,\n', "",
           "test_cache.py::test_key_changes_with_what_changes_pixels_or_times"),
    # Actions.
    Mutant("actions: they are not unwrapped at pi", "rosbag_dataset/synchronisation.py",
           "path[:, j] = np.unwrap(path[:, j])", "pass", SEAM),
    Mutant("actions: a delta over the seam is a turn", "rosbag_dataset/synchronisation.py",
           "np.diff(path[start : stop + 1, self.acted], axis=0)",
           "np.diff(self.states(slice(start, stop + 1))[:, self.acted], axis=0)", SEAM),
    Mutant("actions: -pi stays -pi", "rosbag_dataset/synchronisation.py",
           "turns = np.ceil((angle_rad - np.pi", "turns = np.floor((angle_rad + np.pi",
           "test_synchronisation.py::test_wrap_to_pi_is_half_open"),
    Mutant("actions: each episode counts angles from 0", "rosbag_dataset/statistics.py",
           "return np.round(wrap_to_pi(seam + np.pi), 3)", "return np.zeros(states)", TURNS),
    Mutant("actions: the seam is where the arm works", "rosbag_dataset/statistics.py",
           "wrap_to_pi(seam + np.pi)", "wrap_to_pi(seam)", TURNS),
    Mutant("actions: relative offsets count from the first frame", "rosbag_dataset/synchronisation.py",
           "- self.path_rad[t, self.acted]\n", "- self.path_rad[0, self.acted]\n",
           "test_samples.py::test_the_three_kinds_of_action_describe_one_motion"),
    Mutant("actions: the delta to this frame, not to the next", "rosbag_dataset/synchronisation.py",
           "values[start:last] = of(", "values[start + 1 : last + 1] = of(",
           "test_synchronisation.py::test_deltas_integrate_to_the_states"),
    Mutant("actions: the signs of the joints are ignored", "rosbag_dataset/synchronisation.py",
           "        state, continuous = state * sign, continuous * sign\n", "        pass\n",
           "test_synchronisation.py::test_joint_sign"),
    Mutant("actions: the last frame of a segment has one", "rosbag_dataset/synchronisation.py",
           "stop[first:last] = last - self.ahead", "stop[first:last] = last", CHUNKS),
    Mutant("actions: the first padded one counts", "rosbag_dataset/samples.py",
           'batch["action_is_pad"][b, :count] = False', 'batch["action_is_pad"][b, : count + 1] = False', CHUNKS),
    Mutant("actions: a chunk begins one frame early", "rosbag_dataset/synchronisation.py",
           "return self.first_actions(t, t + count)",
           "return self.first_actions(max(0, t - 1), max(0, t - 1) + count)", SHORT),
    # Normalisation.
    Mutant("normalisation: another epsilon", "lerobot_checkpoint/normalisation.py", "EPS = 1e-8", "EPS = 1e-4",
           "test_normalisation.py::test_normalizer_is_the_formula"),
    Mutant("normalisation: actions lack their mean", "lerobot_checkpoint/normalisation.py",
           'return action.float() * pair["std"] + pair["mean"]', 'return action.float() * pair["std"]',
           "test_normalisation.py::test_normalizer_is_the_formula"),
    Mutant("normalisation: a negative deviation is taken", "lerobot_checkpoint/normalisation.py",
           ' or (name == "std" and (value < 0).any())', "",
           "test_normalisation.py::test_broken_statistics_are_refused"),
    Mutant("normalisation: two that contradict each other are taken", "lerobot_checkpoint/lerobot_reading.py",
           "if not all(np.array_equal(pair[name], stats[key][name]) for name in pair):", "if False:",
           "test_loading.py::test_load_policy_refuses"),
    Mutant("normalisation: none at all is taken", "lerobot_checkpoint/lerobot_reading.py",
           "    if not sources:\n        raise CheckpointError(", "    if not sources:\n        return {}\n        (",
           "test_loading.py::test_no_normalisation_is_refused"),
    # Checkpoints.
    Mutant("checkpoint: a changed file is not noticed", "lerobot_checkpoint/directory.py",
           "if file_sha256(checkpoint / name) != sha256:", "if False:",
           "test_checkpoint_directory.py::test_verify_names_the_damaged_file"),
    Mutant("checkpoint: another step's name is not noticed", "lerobot_checkpoint/directory.py",
           "if match and int(match[1]) != step:", "if False:",
           "test_checkpoint_directory.py::test_verify_knows_which_step_it_is"),
    Mutant("checkpoint: weights are saved while they change", "lerobot_checkpoint/saving.py",
           "into.copy_(value.detach(), non_blocking=value.is_cuda)", "value.detach()",
           "test_resume.py::test_training_goes_on_while_a_checkpoint_is_written"),
    Mutant("checkpoint: a copy keeps the kind of number that the last one had", "lerobot_checkpoint/saving.py",
           "return tensor.dtype, tensor.shape, tensor.stride()", "return tensor.shape, tensor.stride()",
           "test_saving.py::test_copies_are_made_anew_where_a_tensor_has_changed"),
    Mutant("checkpoint: its weights can be read by their owner alone", "lerobot_checkpoint/files.py",
           "        path.chmod(mode)\n", "", "test_saving.py::test_all_files_can_be_read_by_whom_new_files_can"),
    Mutant("checkpoint: an end that was not written goes unnoticed", "lerobot_checkpoint/training_state.py",
           "if not zipfile.is_zipfile(path):", "if False:",
           "test_saving.py::test_an_end_that_torch_could_not_write_is_noticed"),
    Mutant("checkpoint: an error of the background save is lost", "lerobot_checkpoint/saving.py",
           "                    self._error = error\n", "                    pass\n",
           "test_run_dir.py::test_a_save_that_fails_stops_or_goes_on_as_asked[stop]"),
    Mutant("checkpoint: a whole one is removed after a kill", "lerobot_checkpoint/directory.py",
           "                os.rename(old, current)\n", "                shutil.rmtree(old)\n",
           "test_checkpoint_directory.py::test_leftovers_are_cleaned"),
    Mutant("checkpoint: LeRobot gets the cameras in another order", "lerobot_checkpoint/lerobot_writing.py",
           "    for camera in config.cameras:\n        features",
           "    for camera in sorted(config.cameras):\n        features",
           "test_lerobot_files.py::test_config_json_is_lerobot_032s"),
    Mutant("checkpoint: two runs write into one directory", "training/run_dir.py",
           "fcntl.lockf(_output_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
           "test_run_dir.py::test_two_runs_in_one_output_directory_are_refused"),
    # The runner.
    Mutant("runner: the first action is executed twice", "deploy/ur10e_deploy/policy_runner.py",
           "self._queue.extend(chunk[1 : self.n_action_steps])", "self._queue.extend(chunk[: self.n_action_steps])",
           f"{MODES}[None-4-native]"),
    Mutant("runner: the checkpoint's ensembling is ignored", "deploy/ur10e_deploy/policy_runner.py",
           "TemporalEnsembler(self.ensemble_m)", "TemporalEnsembler()", f"{MODES}[0.3-1-native]"),
    Mutant("runner: the newest prediction counts most", "act_model.py",
           "weight = torch.exp(-self.m * self.count)", "weight = torch.exp(self.m * self.count)",
           "test_act_model.py::test_ensembler_is_the_offline_weighted_mean"),
    Mutant("runner: joints are not wrapped as in training", "deploy/ur10e_deploy/policy_runner.py",
           "return self.contract.wrap(state.astype(np.float64))", "return (state.astype(np.float64))",
           "test_deploy_policy.py::test_angles_are_wrapped_as_in_training"),
    Mutant("runner: images are a little too dark", "deploy/ur10e_deploy/policy_runner.py",
           ".float() / 255", ".float() / 256",
           "test_deploy_policy.py::test_the_network_is_the_one_in_the_checkpoint"),
    Mutant("runner: images are resized in another way than in training", "rosbag_dataset/images.py",
           "cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)", "cv2.INTER_LINEAR)",
           "test_images.py::test_resize_is_that_of_opencv"),
    Mutant("runner: NaN reaches the robot", "deploy/ur10e_deploy/policy_runner.py",
           "if not np.isfinite(chunk", "if False and not np.isfinite(chunk",
           "test_deploy_policy.py::test_actions_that_are_not_finite_never_come_out"),
    Mutant("runner: a LeRobot that normalises twice is taken", "deploy/ur10e_deploy/policy_runner.py",
           "if not sigma <= SAME_ACTIONS_SIGMA:", "if False:",
           "test_deploy_policy.py::test_a_lerobot_that_normalises_otherwise_is_refused"),
    Mutant("runner: the robot's signs are forgotten on the way out", "deploy/ur10e_deploy/config.py",
           "return position_rad * self.acted_on(np.asarray(self.joint_sign))", "return position_rad",
           "test_deploy_policy.py::test_the_doors_to_the_robots_own_convention"),
    Mutant("runner: a joint is sent once around", "deploy/ur10e_deploy/config.py",
           "self.beside(action.astype(np.float64), here_rad)", "action.astype(np.float64)", COMMANDS),
    Mutant("runner: a command leaves the joint's limits", "deploy/ur10e_deploy/config.py",
           "np.where(target > high, target - turn, np.where(target < low, target + turn, target))", "target", COMMANDS),
    Mutant("runner: a command outside the limits reaches the robot", "deploy/ur10e_deploy/config.py",
           "np.flatnonzero((position_rad < low) | (position_rad > high))", "np.flatnonzero(position_rad < low)",
           "test_deploy_policy.py::test_a_command_outside_a_joints_limits_is_refused"),
    Mutant("runner: deltas are added to where a lagging arm is", "deploy/ur10e_deploy/config.py",
           "return last_command_rad + action", "return here_rad + action", FOLLOW),
    Mutant("runner: relative offsets are taken for positions", "deploy/ur10e_deploy/policy_runner.py",
           'if self.contract.action_mode == "absolute" or self.contract.action_kind == "delta":', "if True:", FOLLOW),
    Mutant("runner: the contract's reference turn is ignored", "deploy/ur10e_deploy/config.py",
           "wrap_to_pi(angle_rad, reference)", "wrap_to_pi(angle_rad)",
           "test_deploy_policy.py::test_a_state_is_given_on_the_turn_that_training_used"),
    Mutant("runner: percentiles that nobody has measured", "deploy/ur10e_deploy/policy_runner.py",
           'method="higher"', 'method="lower"', PERCENTILES),
    Mutant("runner: real-time on average is real-time", "deploy/ur10e_deploy/policy_runner.py",
           'p99 = inference["p99_ms"]', 'p99 = inference["p50_ms"]', PERCENTILES),
    Mutant("step: freed memory is given back", "training/device.py",
           "        mallopt(trim_threshold, KEPT_BYTES)\n", "",
           "test_device.py::test_a_step_finds_the_memory_that_the_last_one_freed"),
    Mutant("samples: batches come as threads have them", "training/feed.py",
           "ahead.popleft().result()", "ahead.pop().result()",
           "test_feed.py::test_what_threads_load_is_in_order_and_the_same[3]"),
    Mutant("samples: threads outlast their run", "training/feed.py",
           "            pool.shutdown(wait=False, cancel_futures=True)\n", "            pass\n",
           "test_feed.py::test_threads_end_with_the_loader_and_say_what_went_wrong"),
    Mutant("samples: on a GPU, chunks reach beyond their segment", "training/feed.py",
           "is_pad = at >= stop", "is_pad = at > stop", f"{ON_DEVICE}[delta-measured]"),
    Mutant("samples: on a GPU, offsets are taken for positions", "training/feed.py",
           'action = action - tables["origin"][frame][:, None]', "pass", f"{ON_DEVICE}[relative-measured]"),
    Mutant("samples: on a GPU, a picture is of the frame before", "training/feed.py",
           'tables[f"image.{camera}"][frame]', 'tables[f"image.{camera}"][frame - 1]',
           "test_feed.py::test_frames_on_the_device_give_the_same_training"),
    # On the robot.
    Mutant("robot: commands are sent that cannot be stopped from", "deploy/ur10e_deploy/limiter.py",
           "        if path is None:\n            return False",
           "        if path is None:\n            path = wanted[None]",
           "test_limiter.py::test_no_command_breaks_a_limit_whatever_is_asked"),
    Mutant("robot: a way to rest through the table will do", "deploy/ur10e_deploy/limiter.py",
           "if not kept or self.limits", "if not kept or False and self.limits",
           "test_limiter.py::test_the_end_of_a_joint_and_of_the_box_are_reached_and_kept"),
    Mutant("robot: what keeps the limits is filtered all the same", "deploy/ur10e_deploy/limiter.py",
           "self._lost = ~fits", "self._lost = ~(fits := fits & False)", STREAM),
    Mutant("robot: a target that jumped is never caught", "deploy/ur10e_deploy/limiter.py",
           "np.where(self._lost, CAUGHT_JERK, 1.0)", "1.0",
           "test_limiter.py::test_a_stream_that_jumped_is_caught_again"),
    Mutant("robot: late actions are played late", "deploy/ur10e_deploy/playback.py",
           "start, positions = observed_frame + 1,", "start, positions = math.floor(now_frame) + 1,",
           "test_playback.py::test_late_actions_are_dropped_and_counted"),
    Mutant("robot: a chunk changes what is being played", "deploy/ur10e_deploy/playback.py",
           "free = whole + 2 if now_frame == whole else whole + 3", "free = whole + 1",
           "test_playback.py::test_a_seam_has_no_step_in_speed_or_acceleration"),
    Mutant("robot: seams are not blended", "deploy/ur10e_deploy/playback.py",
           "new = old + share**2 * (3 - 2 * share) * (new - old)", "new = new + 0 * share",
           "test_playback.py::test_blending_makes_a_seam_softer"),
    Mutant("robot: it goes on when a protective stop is released", "deploy/ur10e_deploy/control.py",
           "self._phase, self._why = HALTED, why", "self._phase, self._why = HOLDING, why", STOPPED),
    Mutant("robot: a camera may fall silent", "deploy/ur10e_deploy/control.py",
           "if silent and self._phase in (WAITING, RUNNING):", "if False:", SILENT),
    Mutant("robot: it waits for ever", "deploy/ur10e_deploy/control.py",
           "now_s - self._troubled_s > settings.recover_s", "False", SILENT),
    Mutant("robot: a dry run commands", "deploy/ur10e_deploy/control.py",
           "            if self._settings.commanding:\n                self._robot.command(",
           "            if True:\n                self._robot.command(",
           "test_control.py::test_dry_run_commands_nothing_and_shadow_compares"),
    Mutant("robot: an arm that is held is pushed on", "deploy/ur10e_deploy/control.py",
           "known and away_rad.max() > self._limits.tracking_rad:", "False:",
           "test_control.py::test_an_arm_that_does_not_follow_is_halted"),
    Mutant("robot: a starved stream is taken up again", "deploy/ur10e_deploy/control.py",
           "gap_s > settings.max_gap_s", "False", "test_control.py::test_a_stream_that_starved_is_not_taken_up_again"),
    Mutant("robot: the policy's signs reach the arm", "deploy/ur10e_deploy/thinking.py",
           "return np.array(rows)[:, self._order] * self._sign", "return np.array(rows)[:, self._order]",
           "test_control.py::test_all_action_modes_lead_to_the_same_place_with_a_gripper[absolute]"),
    Mutant("robot: a wild policy may go on", "deploy/ur10e_deploy/control.py",
           "if beyond_rad > settings.max_beyond_rad:", "if False:",
           "test_control.py::test_jumps_are_limited_counted_and_end_the_run"),
    Mutant("robot: a fault of ours leaves a command standing", "deploy/ur10e_deploy/control.py",
           "            if self._settings.commanding:\n                self._robot.halt()\n            raise",
           "            raise", "test_control.py::test_a_fault_of_the_loop_halts_the_robot"),
    Mutant("robot: any start will do", "deploy/ur10e_deploy/start_checks.py",
           "if found > allowed:", "if False:",
           "test_start_checks.py::test_a_start_like_training_is_taken_and_one_far_away_refused"),
    Mutant("robot: the light may be off", "deploy/ur10e_deploy/start_checks.py",
           "if not DARKER * darkest <= level <= BRIGHTER * brightest:", "if False:",
           "test_start_checks.py::test_a_picture_unlike_training_is_refused"),
    Mutant("robot: a frozen camera will do", "deploy/ur10e_deploy/start_checks.py",
           "(noisy and np.array_equal(rgb, first[camera].rgb))", "False",
           "test_start_checks.py::test_a_frozen_camera_is_refused"),
    Mutant("robot: a paused program is left on the controller", "deploy/ur10e_deploy/rtde_robot.py",
           "            dashboard.stop()\n", "", f"{RTDE_FAULT}[protective stop]"),
    Mutant("robot: the pendant's slider is not looked at", "deploy/ur10e_deploy/rtde_robot.py",
           "receive.getSpeedScaling() * receive.getTargetSpeedFraction()", "receive.getSpeedScaling()",
           f"{RTDE_FAULT}[speed scaling]"),
    Mutant("robot: a connection that was closed is not noticed", "deploy/ur10e_deploy/rtde_robot.py",
           "if not receive.isConnected() or (", "if False and (", f"{RTDE_FAULT}[connection]"),
    Mutant("robot: nothing ends the program of a killed runner", "deploy/ur10e_deploy/rtde_robot.py",
           "            if not self._watched:", "            if False:",
           "test_rtde_robot.py::test_a_killed_runner_leaves_an_arm_that_stands_and_no_program"),
    Mutant("robot: a dry run takes the arm from a person's program", "deploy/ur10e_deploy/rtde_robot.py",
           "if commanding else None", "if True else None",
           "test_rtde_robot.py::test_a_dry_run_uploads_no_program_and_what_is_wrong_is_one_line"),
    Mutant("robot: red and blue are swapped", "deploy/ur10e_deploy/cameras.py",
           "cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)", "bgr",
           "test_rtde_robot.py::test_a_camera_that_ends_is_opened_again"),
    Mutant("robot: a camera that fails is given up", "deploy/ur10e_deploy/cameras.py",
           "                capture = _open(source, shape)\n", "                return\n",
           "test_rtde_robot.py::test_a_camera_that_ends_is_opened_again"),
    Mutant("robot: over ROS 2 a halt leaves the robot's program running", "deploy/ur10e_deploy/ros2_robot.py",
           "if self._commanding and self._hand_back.service_is_ready():", "if False:",
           f"{ROS2_HALT}[protective stop and release]"),
    Mutant("robot: the driver's speed scaling is not looked at", "deploy/ur10e_deploy/ros2_robot.py",
           "            scaling = percent / 100\n", "", f"{ROS2_HALT}[protective stop and release]"),
    Mutant("robot: a second arm may publish joint states", "deploy/ur10e_deploy/ros2_robot.py",
           "> how.joint_publishers:", "> 99:", f"{ROS2_HALT}[second publisher]"),
    Mutant("robot: positions go to the controller in our order", "deploy/ur10e_deploy/ros2_robot.py",
           "position_rad[self._order]", "position_rad", "test_ros2.py::test_the_expert_does_its_task_over_ros_2"),
    Mutant("robot: a picture is as young as when it was looked at", "deploy/ur10e_deploy/ros2_robot.py",
           "return {camera: self._arrived[camera][0] for", "return {camera: self.clock.now_s() for",
           "test_ros2.py::test_a_camera_that_dies_holds_the_arm"),
    Mutant("robot: joint states are as young as when they were looked at", "deploy/ur10e_deploy/ros2_robot.py",
           "        return JointReading(stamp_s, ", "        return JointReading(self.clock.now_s(), ",
           "test_ros2.py::test_joint_states_that_come_back_go_on"),
    Mutant("robot: pictures may be older than in training", "deploy/ur10e_deploy/ros2_robot.py",
           "if here_s > most_s:", "if False:", "test_ros2.py::test_pictures_older_than_in_training_are_refused"),
    Mutant("robot: nobody need listen to the commands", "deploy/ur10e_deploy/ros2_robot.py",
           "if not self._publisher.get_subscription_count():", "if False:",
           "test_ros2.py::test_commands_that_nobody_takes_are_refused"),
    Mutant("robot: a trajectory's point is a second away", "deploy/ur10e_deploy/ros2_robot.py",
           "divmod(round(1e9 / self._options.command_hz), 10**9)", "1, 0",
           "test_ros2.py::test_a_runner_that_is_killed_leaves_an_arm_that_goes_to_its_last_command_and_stands"),
    # On OSMO.
    Mutant("osmo: file cache counts as memory in use", "osmo/heartbeat.py", "0) - cache", "0)",
           f"{ATTEMPTS}[full of file cache]"),
    Mutant("osmo: a restart in place counts as out of memory", "osmo/heartbeat.py", "    if same_container:",
           "    if False:", f"{ATTEMPTS}[restarted in place, with the others]"),
    Mutant("osmo: a preempted run counts as out of memory", "osmo/heartbeat.py", "and level(last) == 2)", ")",
           f"{ATTEMPTS}[preempted twice, early]"),
    Mutant("osmo: the first time is forgotten", "osmo/heartbeat.py", 'last["out_of_memory"] if same', "0 if same",
           f"{ATTEMPTS}[twice]"),
    Mutant("osmo: more memory does not help", "osmo/heartbeat.py", '0 < now["limit"] <= last["limit"]', "True",
           f"{ATTEMPTS}[more memory since]"),
    Mutant("osmo: a failed upload counts", "osmo/uploads.py", "(files != len(new) or size < expected)", "False",
           "test_osmo_ends.py::test_what_did_not_arrive_does_not_count"),
    Mutant("osmo: every file is sent again", "osmo/uploads.py", "if self.sent.get(name) != stamp", "if True",
           "test_osmo_ends.py::test_each_checkpoint_is_sent_once_and_removed_with_the_runs"),
    Mutant("osmo: a newer checkpoint of another attempt is removed", "osmo/uploads.py", "if steps[folder] <= newest",
           "if True", "test_osmo_ends.py::test_what_earlier_attempts_left_goes_when_it_is_old"),
    # Submitting to OSMO, and comparing what comes out.
    Mutant("submit: recordings are known by their first bytes", "osmo/submit.py",
           "while block := stream.read(1 << 20):", "if block := stream.read(1 << 10):", TAG),
    Mutant("submit: what is there in part is not uploaded", "osmo/submit.py",
           "return self._names <= there", "return bool(self._names & there)", UPLOADED),
    Mutant("submit: the bags are read with the default settings", "osmo/submit.py",
           "dataclasses.replace(bag_settings(config), bag_dir=folder)",
           "dataclasses.replace(bag_settings(Config()), bag_dir=folder)", INSPECTED),
    Mutant("submit: the file wins over the words", "osmo/submit.py",
           "        given[key] = value\n    overrides", "        given.setdefault(key, value)\n    overrides",
           "test_osmo_submit.py::test_a_word_wins_over_the_file"),
    Mutant("submit: --set changes a value", "osmo/submit.py",
           "return str(_typed(text)) != text", "return False",
           "test_osmo_submit.py::test_values_arrive_as_they_are_typed"),
    Mutant("submit: a gate is about the worst run", "deploy/ur10e_deploy/compare.py",
           "best = groups[0][0]", "best = groups[0][-1]",
           "test_deploy_eval.py::test_a_gate_of_a_comparison_is_about_the_best"),
    Mutant("report: the best come first", "rosbag_dataset/findings.py",
           "([-count[name, badness]", "([count[name, badness]",
           "test_html_report.py::test_the_worst_come_first"),
    Mutant("report: a recording's name is markup", "rosbag_dataset/html_report.py",
           "<h3>{escape(name)}</h3>", "<h3>{name}</h3>",
           "test_html_report.py::test_names_are_escaped"),
    Mutant("report: thinning loses a peak", "report_page.py",
           "int(y[start:stop].argmax())", "int(y[start:stop].argmin())",
           "test_html_report.py::test_curves_are_thinned_without_losing_a_peak"),
    Mutant("report: kinematics of joints with another sign", "rosbag_dataset/findings.py",
           "q_rad * np.array(settings.joint_sign)[columns]", "q_rad",
           "test_html_report.py::test_signs_are_taken_back_for_kinematics"),
    Mutant("report: half a page replaces the old one", "rosbag_dataset/inspection.py",
           "with partial.open(", "with path.open(",
           "test_html_report.py::test_a_page_is_there_as_a_whole_or_not_at_all"),
    Mutant("report: a driver that hung is not noticed", "rosbag_dataset/looking.py",
           "if repeated_s >= REPEATED_S:", "if False:",
           "test_html_report.py::test_each_planted_fault_is_named_with_what_to_do[driver_hangs]"),
    Mutant("report: a motion that was replayed is not noticed", "rosbag_dataset/findings.py",
           "if apart_rad < TWIN_RAD and not", "if apart_rad < 0 and not",
           "test_html_report.py::test_each_planted_fault_is_named_with_what_to_do[replayed]"),
    Mutant("report: a part of a recording shows all of its pictures", "rosbag_dataset/looking.py",
           "_spread(of_camera, first_ns, last_ns)", "_spread(of_camera, of_camera[0][0], of_camera[-1][0])",
           "test_html_report.py::test_parts_of_a_recording_have_looks_of_their_own"),
    Mutant("report: every episode is blamed for the cell", "rosbag_dataset/findings.py",
           "if finding.kind not in common]", "]",
           "test_html_report.py::test_what_most_episodes_have_is_said_once"),
]  # fmt: skip


def places(mutant: Mutant, root: Path = ROOT) -> int:
    """How often the mutant's text stands in its file."""
    path = root / mutant.file
    return path.read_text().count(mutant.text) if path.exists() else 0


def copy_tree(to: Path) -> None:
    """Every file of the working tree that git knows or would take, and no link, which may lead to shared packages."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and not path.is_symlink():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to / name)


def environment(tree: Path) -> dict[str, str]:
    """In which the modules of `tree` are found before those of any checkout that is installed."""
    from tests.lerobot_044.launch import PYTHON
    from tests.ros2 import ROS2

    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "deploy"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LEROBOT_044_PYTHON": str(PYTHON),
        "ROS2_PACKAGES": str(ROS2),
    }


def run_tests(tree: Path, tests: list[str], jobs: int = 0, bags: Path | None = None) -> tuple[int, str]:
    """Run tests on a copy, in `jobs` processes beside pytest's own; -> (its exit code, the end of what it said).

    A test that is skipped notices nothing: as none that ran, 5.

    The sample bags are copied from `bags`, if it is given, and otherwise recorded in TREE/.tmp/sample/bags, which takes
    longer than most tests.
    """
    command = [sys.executable, "-m", "pytest", "-n", str(jobs), "--dist", "loadfile", "-x", "-q"]
    command += ["-p", "no:cacheprovider", f"--timeout={LIMIT_S}", "--basetemp", str(tree / ".tmp")]
    command += [f"tests/{test}" for test in tests]
    env = environment(tree) | ({"SAMPLE_BAGS": str(bags)} if bags else {})
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    skipped = re.search(r"\b[1-9]\d* skipped\b", done.stdout.splitlines()[-1] if done.stdout else "")
    return 5 if not done.returncode and skipped else done.returncode, (done.stdout + done.stderr)[-2000:]


def check_copy(tree: Path) -> None:
    """See that a copy's own modules are imported: a bug planted in each of them is met. Raises SystemExit."""
    names = ("train", "act_model", "ur10e", "training", "rosbag_dataset", "lerobot_checkpoint", "ur10e_deploy")
    for name in names:
        folder = tree / ("deploy" if name == "ur10e_deploy" else "") / name
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        content = file.read_text()
        file.write_text(f"raise SystemExit('canary of {name}')\n")
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tree.parent, env=environment(tree),
                              capture_output=True, text=True)  # fmt: skip
        file.write_text(content)
        if f"canary of {name}" not in done.stderr:
            sys.exit(f"error: the copy's {name} is not the one that is imported; run in another environment")


def try_mutant(mutant: Mutant, clean: Path, bags: Path) -> tuple[str, float, str]:
    """Plant one bug in a copy of `clean` and run its test; -> (verdict, seconds, what pytest said)."""
    began_s = time.monotonic()
    if places(mutant, clean) != 1:
        return NOT_APPLICABLE, 0.0, f"{mutant.file} has its text {places(mutant, clean)} times, expected once"
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(clean, tree)
        path = tree / mutant.file
        path.write_text(path.read_text().replace(mutant.text, mutant.planted))
        code, said = run_tests(tree, [mutant.test], bags=bags if bags.exists() else None)
    verdict = {0: SURVIVED, 1: KILLED}.get(code, NOT_APPLICABLE)  # others: no such test, or it could not start
    return verdict, time.monotonic() - began_s, said


def page(rows: list[tuple[Mutant, str]], commit: str) -> str:
    """The table as a page of the documentation."""
    killed = sum(verdict == KILLED for _, verdict in rows)
    lines = [
        "# Bugs that were planted, and the tests that noticed",
        "",
        f"{killed} of {len(rows)} were noticed, at commit {commit}.",
        "`python -m tests.mutants --output docs/mutants.md` plants each in a copy of the code and runs the one test",
        "that is named for it, which passes on the code as it is. `tests/mutants.py` has the changed lines.",
        "",
        "| Area | What is wrong | In | Test | |",
        "|---|---|---|---|---|",
    ]
    for mutant, verdict in rows:
        area, what = mutant.name.split(": ", 1)
        lines.append(f"| {area} | {what} | `{mutant.file}` | `{mutant.test}` | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant bugs, one at a time; see that the tests named for them fail.")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--output", type=Path, help="write the table there, as a page in Markdown")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in mutant.name]
    if not chosen:
        parser.error(f"--only {args.only}: in no mutant's name")
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    commit = head.strip() + (" with uncommitted changes" if changed else "")
    rows: list[tuple[Mutant, str]] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        clean = Path(folder) / "clean"
        copy_tree(clean)
        check_copy(clean)
        tests = sorted({mutant.test for mutant in chosen})
        code, said = run_tests(clean, tests, args.jobs)
        if code:
            sys.exit(f"error: a named test fails, or is skipped, on the code as it is:\n{said}")
        bags = clean.with_name("bags")
        if (clean / ".tmp/sample/bags").exists():
            (clean / ".tmp/sample/bags").rename(bags)
        shutil.rmtree(clean / ".tmp", ignore_errors=True)
        print(f"{len(tests)} tests pass on the code as it is", flush=True)
        results = pool.map(lambda mutant: try_mutant(mutant, clean, bags), chosen)
        for mutant, (verdict, seconds, said) in zip(chosen, results, strict=True):
            rows.append((mutant, verdict))
            print(f"{verdict:<14} {seconds:5.0f} s  {mutant.name}", flush=True)
            if verdict == NOT_APPLICABLE:
                print(said, file=sys.stderr, flush=True)
    if args.output:
        args.output.write_text(page(rows, commit))
    survived = [mutant.name for mutant, verdict in rows if verdict != KILLED]
    print(f"{len(rows) - len(survived)} of {len(rows)} killed" + "".join(f"\n  not killed: {n}" for n in survived))
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
