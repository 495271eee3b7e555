"""The checkpoint directory: real LeRobot 0.3.2 and 0.4.4 read it, we read theirs, and no failure leaves half of one."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lerobot_checkpoint as checkpoints
from act_model import ACT, ACTConfig
from lerobot_checkpoint import CheckpointError, Normalizer, load_policy, save_checkpoint
from tests.lerobot_044 import launch

ACTION_TOLERANCE = 1e-5  # rad
VERSIONS = ("0.3.2", "0.4.4")
# "wrist" before "front": an order that sorting would change. Their sizes differ too.
CAMERAS = {"one camera": dict(top=(40, 56)), "two cameras": dict(wrist=(64, 33), front=(40, 56))}


def settings(image_shapes: dict) -> dict:
    return dict(
        state_dim=6, action_dim=7, cameras=tuple(image_shapes), chunk_size=10, dim_model=32, n_heads=4,
        dim_feedforward=48, feedforward_activation="relu", n_encoder_layers=1, n_decoder_layers=1,
        n_vae_encoder_layers=1, use_vae=True, latent_dim=8, dropout=0.1, pre_norm=False, vision_backbone="resnet18",
        replace_final_stride_with_dilation=False,
    )  # fmt: skip


def random_stats(config: ACTConfig) -> checkpoints.Stats:
    rng = np.random.default_rng(0)
    return {
        key: dict(mean=rng.normal(size=shape).astype(np.float32), std=rng.uniform(0.1, 1.0, shape).astype(np.float32))
        for key, shape in checkpoints.stats_shapes(config).items()
    }


def make_run(image_shapes: dict) -> dict:
    """save_checkpoint's keyword arguments, for a random model with random statistics."""
    torch.manual_seed(0)
    config = ACTConfig(**settings(image_shapes))
    return dict(
        model_state=ACT(config).state_dict(),
        act_config=config,
        image_shapes=image_shapes,
        stats=random_stats(config),
        policy_fields=dict(
            n_action_steps=10,
            temporal_ensemble_coeff=None,
            kl_weight=10.0,
            optimizer_lr=1e-5,
            optimizer_weight_decay=1e-4,
            optimizer_lr_backbone=1e-5,
        ),
        train_config=dict(seed=7, model=dict(pretrained_backbone="resnet18.pt")),
        training_state=dict(step=1, rng=torch.get_rng_state(), losses=[0.5, None], name="run"),
    )


def raw_observation(image_shapes: dict) -> dict[str, torch.Tensor]:
    """What a robot gives: joints in rad, images uint8 / 255."""
    generator = torch.Generator().manual_seed(3)
    observation = {"observation.state": torch.randn(2, 6, generator=generator)}
    for camera, size in image_shapes.items():
        pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)
        observation[f"observation.images.{camera}"] = pixels.float() / 255
    return observation


@pytest.fixture(scope="module")
def run() -> dict:
    return make_run(CAMERAS["one camera"])


@pytest.fixture(scope="module")
def saved_once(run, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("saved"), 5, **run)


@pytest.fixture
def pretrained(saved_once, tmp_path) -> Path:
    """A copy of a pretrained_model/ directory, away from its manifest, to be broken."""
    return Path(shutil.copytree(saved_once / "pretrained_model", tmp_path / "copy"))


@pytest.fixture
def checkpoint(saved_once, tmp_path) -> Path:
    """A copy of a whole checkpoint, to be broken."""
    return Path(shutil.copytree(saved_once, tmp_path / saved_once.name))


# ---- LeRobot reads ours, we read LeRobot's -------------------------------------------------------------------


def exchange_jobs(folder: Path) -> list:
    """Our checkpoints and raw observations for both camera sets, and what LeRobot has to do with them."""
    jobs = []
    for name, image_shapes in CAMERAS.items():
        place = folder / name.replace(" ", "-")
        run = make_run(image_shapes)
        ours = save_checkpoint(place / "ours", 1, **run) / "pretrained_model"
        observation, stats = str(place / "observation.safetensors"), str(place / "stats.safetensors")
        save_file(raw_observation(image_shapes), observation)
        flat = {f"{key}.{n}": torch.tensor(value) for key, pair in run["stats"].items() for n, value in pair.items()}
        save_file(flat, stats)
        asked = dict(observation=observation, out=str(place / "ours.out"))
        jobs.append(["act", dict(pretrained=str(ours), **asked)])
        native = dict(pretrained=str(place / "native"), observation=observation, out=str(place / "native.out"))
        jobs.append(["write", dict(settings=settings(image_shapes), image_shapes=image_shapes, stats=stats, **native)])
    return jobs


@pytest.fixture(scope="module")
def exchanged_044(tmp_path_factory) -> Path:
    return launch.run_once(tmp_path_factory, "checkpoint-exchange", exchange_jobs)


@pytest.fixture(scope="module")
def exchanged_032(tmp_path_factory) -> Path:
    from tests.lerobot_044 import reference  # imports lerobot, which the killed processes below do without

    folder = tmp_path_factory.mktemp("exchange-032")
    for function, arguments in exchange_jobs(folder):
        getattr(reference, function)(**arguments)
    return folder


@pytest.fixture
def exchanged(request, lerobot, name) -> Path:
    folder = request.getfixturevalue(f"exchanged_{lerobot.replace('.', '')}")
    return folder / name.replace(" ", "-")


@pytest.mark.parametrize("lerobot", VERSIONS)
@pytest.mark.parametrize("name", CAMERAS)
def test_lerobot_acts_on_our_checkpoint_as_we_do(exchanged, name, lerobot):
    """The same raw observation gives the same joint angles in LeRobot and in our Policy, chunk and first action."""
    theirs = load_file(exchanged / "ours.out")
    policy = load_policy(exchanged / "ours")
    chunk = policy.predict_chunk(raw_observation(CAMERAS[name]))
    assert (chunk - theirs["chunk"]).abs().max() <= ACTION_TOLERANCE
    assert (chunk[:, 0] - theirs["first"]).abs().max() <= ACTION_TOLERANCE
    assert chunk.std() > 0.1  # the angles do differ


@pytest.mark.parametrize("lerobot", VERSIONS)
@pytest.mark.parametrize("name", CAMERAS)
def test_we_act_on_lerobots_own_checkpoint_as_it_does(exchanged, name, lerobot):
    """load_policy reads what this LeRobot's save_pretrained wrote: same statistics, same joint angles."""
    theirs = load_file(exchanged / "native.out")
    policy = load_policy(exchanged / "native")
    chunk = policy.predict_chunk(raw_observation(CAMERAS[name]))
    assert (chunk - theirs["chunk"]).abs().max() <= ACTION_TOLERANCE
    assert policy.act_config == ACTConfig(**settings(CAMERAS[name]))
    assert policy.image_shapes == CAMERAS[name] and policy.train_config is None
    expected = random_stats(policy.act_config)
    assert all(np.array_equal(policy.stats[key][n], expected[key][n]) for key in expected for n in ("mean", "std"))


@pytest.mark.parametrize("name", CAMERAS)
def test_config_json_is_lerobot_032s(tmp_path, name):
    """Every field and value of config.json is what 0.3.2 itself writes for this policy, except push_to_hub."""
    from tests.lerobot_044 import reference

    image_shapes = CAMERAS[name]
    run = make_run(image_shapes)
    reference.make_config(settings(image_shapes), image_shapes)._save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    ours = checkpoints.lerobot_config(run["act_config"], image_shapes, run["policy_fields"])
    ours = json.loads(json.dumps(ours))
    assert set(ours) == set(theirs)
    assert ours == {**theirs, "push_to_hub": False}
    assert list(ours["input_features"]) == list(theirs["input_features"])  # the cameras' order


@pytest.mark.parametrize("name", CAMERAS)
def test_processor_files_are_lerobot_044s(exchanged_044, name):
    """The processors' JSON and file names are what 0.4.4 itself writes."""
    place = exchanged_044 / name.replace(" ", "-")
    ours, theirs = place / "ours" / "last" / "pretrained_model", place / "native"
    for file in (checkpoints.PREPROCESSOR, checkpoints.POSTPROCESSOR):
        assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text())
    assert {p.name for p in ours.iterdir()} - {p.name for p in theirs.iterdir()} == {"train_config.json"}


# ---- Saving and reading back ---------------------------------------------------------------------------------


def test_save_and_load_round_trip(run, tmp_path):
    """Weights, statistics, configuration and training state come back as they went in, to the last bit."""
    path = save_checkpoint(tmp_path, 5000, **run)
    assert path == tmp_path / "checkpoint_005000" and os.readlink(tmp_path / "last") == path.name
    checkpoints.verify_checkpoint(path)
    policy = load_policy(tmp_path)
    assert policy.path == path / "pretrained_model" and not policy.model.training
    for key, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, run["model_state"][key]), key
    for key, pair in run["stats"].items():
        assert all(np.array_equal(policy.stats[key][name], value) for name, value in pair.items())
    for field in ("act_config", "image_shapes", "policy_fields", "train_config"):
        assert getattr(policy, field) == run[field]
    state = checkpoints.load_training_state(path)
    assert torch.equal(state.pop("rng"), run["training_state"]["rng"])
    assert state == dict(step=1, losses=[0.5, None], name="run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_005000", "last"]  # nothing temporary


@pytest.mark.parametrize("where", ["", "pretrained_model", ".."])
def test_load_policy_takes_any_of_its_directories(saved_once, where):
    """The checkpoint, its pretrained_model/ and the output directory all name the same policy."""
    assert load_policy(saved_once / where).path == saved_once / "pretrained_model"


def test_channels_last_weights_are_stored_plain(run, tmp_path):
    """Weights in channels_last come back the same: the file format knows one memory order only."""
    model = ACT(run["act_config"])
    model.load_state_dict(run["model_state"])
    model.to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path, 1, **{**run, "model_state": model.state_dict()})
    loaded = load_policy(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in run["model_state"].items())


def test_output_directory_can_move(run, tmp_path):
    """Links are relative: a copied or mounted output directory still loads."""
    save_checkpoint(tmp_path / "a", 1, **run)
    os.rename(tmp_path / "a", tmp_path / "b")
    assert load_policy(tmp_path / "b").path == tmp_path / "b" / "checkpoint_000001" / "pretrained_model"


def test_steps_sort_beyond_six_digits(run, tmp_path):
    """Names are padded to the run's length, and order is by number in any case."""
    names = [save_checkpoint(tmp_path, step, **run).name for step in (999_999, 1_000_000)]
    names.append(save_checkpoint(tmp_path, 20, **run, total_steps=1_500_000).name)
    assert names == ["checkpoint_999999", "checkpoint_1000000", "checkpoint_0000020"]
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == [names[2], names[0], names[1]]


def test_normalizer_is_the_formula(run):
    """(x - mean) / (std + 1e-8), and back; entries it does not know pass through; raw bytes are refused."""
    normalizer = Normalizer(run["stats"])
    batch = raw_observation(CAMERAS["one camera"])
    batch |= {"action": torch.randn(2, 10, 7), "action_is_pad": torch.zeros(2, 10, dtype=torch.bool)}
    out = normalizer.normalize(batch)
    for key, pair in run["stats"].items():
        expected = (batch[key].double() - torch.tensor(pair["mean"])) / (torch.tensor(pair["std"]).double() + 1e-8)
        torch.testing.assert_close(out[key].double(), expected, rtol=1e-6, atol=1e-6)
        assert out[key].dtype == torch.float32
    assert out["action_is_pad"] is batch["action_is_pad"]
    torch.testing.assert_close(normalizer.unnormalize_action(out["action"]), batch["action"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="observation.images.top is torch.uint8; expected floats"):
        normalizer.normalize({**batch, "observation.images.top": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)})
    with pytest.raises(KeyError, match="observation.state is not in the batch"):
        normalizer.normalize({"action": batch["action"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_state={}), "model.safetensors: model_state does not fit act_config: missing"),
        (dict(image_shapes=dict(front=(4, 4))), "config.json: image_shapes has ['front']; expected ['top']"),
        (dict(policy_fields={}), "config.json: policy_fields has []; expected"),
        (dict(stats={}), "stats: no mean of observation.state"),
        (dict(train_config=dict(path=Path("x"))), "train_config.json: Object of type"),
        (
            dict(training_state=dict(rng=dict(numpy=[np.zeros(3)]))),
            "training_state/training_state.pt: training_state['rng']['numpy'][0] is numpy.ndarray; expected tensors",
        ),
        (dict(training_state=dict(lr=np.float64(1))), "training_state['lr'] is numpy.float64"),
    ],
)
def test_bad_contents_are_refused_before_the_disk_is_touched(run, tmp_path, change, message):
    """A checkpoint that could not be read back is never written; the message says what is wrong."""
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "out", 1, **{**run, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_policy_fields_that_lerobot_refuses_are_refused(run, tmp_path):
    """A temporal ensemble takes one action a time; more steps than a chunk has cannot be taken."""
    for fields in (dict(temporal_ensemble_coeff=0.01), dict(n_action_steps=11)):
        with pytest.raises(CheckpointError, match="n_action_steps is 1[01]; expected 1 to 1"):
            save_checkpoint(tmp_path, 1, **{**run, "policy_fields": {**run["policy_fields"], **fields}})


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_broken_statistics_are_refused(run, tmp_path, value):
    """NaN, infinite or negative deviations never reach a robot."""
    stats = {key: {name: v.copy() for name, v in pair.items()} for key, pair in run["stats"].items()}
    stats["action"]["std"][2] = value
    with pytest.raises(CheckpointError, match="stats: std of action is .* expected finite numbers, std >= 0"):
        save_checkpoint(tmp_path, 1, **{**run, "stats": stats})


# ---- Damage is named -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*checkpoints.FILES, checkpoints.MANIFEST])
def test_verify_names_the_damaged_file(checkpoint, file):
    """A missing, truncated or changed file is named, whichever it is."""
    path = checkpoint / file
    content = path.read_bytes()
    damages = {"truncated": content[: len(content) // 2], "changed": content[:-1] + bytes([content[-1] ^ 1])}
    if file == checkpoints.MANIFEST:
        del damages["changed"]  # a changed closing brace is a truncation
    for damage in damages.values():
        path.write_bytes(damage)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.verify_checkpoint(checkpoint)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path}: missing"):
        checkpoints.verify_checkpoint(checkpoint)
    path.write_bytes(content)
    checkpoints.verify_checkpoint(checkpoint)


@pytest.mark.parametrize("file", ["pretrained_model/notes.txt", "training_state/more/x.pt", "README.md"])
def test_verify_names_a_foreign_file(checkpoint, file):
    """A file that the manifest does not list is named."""
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_text("?")
    with pytest.raises(CheckpointError, match=f"{checkpoint / file.removesuffix('x.pt')}.*: foreign"):
        checkpoints.verify_checkpoint(checkpoint)


def test_verify_knows_which_step_it_is(checkpoint):
    """A checkpoint under another step's name is refused: resuming would lie about the step."""
    renamed = checkpoint.rename(checkpoint.with_name("checkpoint_000006"))
    with pytest.raises(CheckpointError, match="holds step 5 by its manifest"):
        checkpoints.verify_checkpoint(renamed)


def test_newest_skips_damage_and_says_so(run, tmp_path):
    """The newest checkpoint that verifies is used; each newer one is reported with its reason."""
    paths = [save_checkpoint(tmp_path, step, **run) for step in (1, 2, 3)]
    os.truncate(paths[2] / "training_state" / "training_state.pt", 10)
    (paths[1] / "pretrained_model" / "config.json").unlink()
    heard: list[str] = []
    assert checkpoints.newest_checkpoint(tmp_path, on_bad=heard.append) == paths[0]
    assert len(heard) == 2 and "training_state.pt: 10 bytes" in heard[0] and "config.json: missing" in heard[1]
    assert checkpoints.newest_checkpoint(tmp_path / "nowhere") is None
    # A policy needs no training state, but weights that are not those which were written are refused ...
    assert load_policy(tmp_path).path.parent == paths[2]
    os.truncate(paths[2] / "pretrained_model" / "model.safetensors", 10_000)
    with pytest.raises(CheckpointError, match="model.safetensors: 10000 bytes; expected"):
        load_policy(tmp_path)  # ... and an older policy does not run unasked
    with pytest.raises(CheckpointError, match="training_state.pt: unreadable"):
        checkpoints.load_training_state(paths[2])


def edit_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, edit) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def without_buffers(tensors: dict) -> None:
    for key in [key for key in tensors if not key.startswith("model.")]:
        del tensors[key]


def remove_processors(pretrained: Path) -> None:
    for path in pretrained.glob("policy_*"):
        path.unlink()


def test_either_normalisation_alone_is_enough(pretrained, run):
    """Buffers alone are 0.3.2's format, processors alone 0.4's: both give the statistics that were saved."""
    hidden = pretrained.with_name("hidden")
    shutil.copytree(pretrained, hidden)
    remove_processors(pretrained)
    edit_tensors(hidden / "model.safetensors", without_buffers)
    for directory in (pretrained, hidden):
        stats = load_policy(directory).stats
        assert all(np.array_equal(stats[key][n], v) for key, pair in run["stats"].items() for n, v in pair.items())


def test_no_normalisation_is_refused(pretrained):
    """Weights alone would drive the robot with un-normalised actions."""
    remove_processors(pretrained)
    edit_tensors(pretrained / "model.safetensors", without_buffers)
    with pytest.raises(CheckpointError, match="no normalisation, neither buffers in model.safetensors nor policy_pre"):
        load_policy(pretrained)


def scale(key: str, factor: float):
    return lambda tensors: tensors[key].mul_(factor)


WEIGHTS, PRE, POST = "model.safetensors", checkpoints.PREPROCESSOR, checkpoints.POSTPROCESSOR
NORMALIZER, UNNORMALIZER = checkpoints.NORMALIZER, checkpoints.UNNORMALIZER


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        # Two statistics that contradict each other, wherever they are.
        (WEIGHTS, scale("normalize_inputs.buffer_observation_state.mean", 1.01), "observation.state contradict"),
        (WEIGHTS, scale("normalize_targets.buffer_action.std", 1.01), "statistics of action contradict"),
        (WEIGHTS, scale("unnormalize_outputs.buffer_action.mean", 1.01), "statistics of action contradict"),
        (NORMALIZER, scale("observation.images.top.std", 1.01), "observation.images.top contradict"),
        (UNNORMALIZER, scale("action.std", 1.01), "statistics of action contradict"),
        # One of them absent, or never set.
        (WEIGHTS, lambda t: t.pop("unnormalize_outputs.buffer_action.std"), "(buffers): no std of action"),
        (WEIGHTS, scale("normalize_inputs.buffer_observation_state.std", np.inf), "the statistics were never set"),
        (NORMALIZER, lambda t: t.pop("observation.state.mean"), "no mean of observation.state"),
        (UNNORMALIZER, lambda t: t.pop("action.mean"), f"{POST}: no mean of action"),
        (PRE, lambda j: j["steps"].pop(), f"{PRE}: no mean of observation.state"),
        (POST, lambda j: j["steps"][0].pop("state_file"), f"{POST}: no mean of action"),
        # A normalisation, or a step, other than ours.
        ("config.json", lambda j: j["normalization_mapping"].update(ACTION="MIN_MAX"), "normalization_mapping is"),
        (PRE, lambda j: j["steps"][3]["config"].update(eps=1e-6), "normalises with {'eps': 1e-06"),
        (PRE, lambda j: j["steps"][0]["config"].update(rename_map=dict(a="b")), "rename_observations_processor"),
        (POST, lambda j: j["steps"].append(dict(registry_name="delta")), "step delta {} is unknown here"),
        # Weights that are not this configuration's.
        (WEIGHTS, lambda t: t.pop("model.action_head.bias"), "missing action_head.bias; use a complete"),
        (WEIGHTS, lambda t: t.update({"model.x": torch.zeros(1)}), "unexpected x;"),
        (WEIGHTS, lambda t: t.update(x=torch.zeros(1)), "unexpected x;"),
        ("config.json", lambda j: j.update(dim_feedforward=64), "linear1.weight (48, 32) instead of (64, 32)"),
        # A configuration that this code cannot run.
        ("config.json", lambda j: j.update(type="diffusion"), "type is 'diffusion'; expected 'act'"),
        ("config.json", lambda j: j.update(dim_model=30), "ACTConfig.dim_model is 30; expected a multiple"),
        ("config.json", lambda j: j.pop("latent_dim"), "no 'latent_dim'"),
        (
            "config.json",
            lambda j: j["input_features"].update({"observation.environment_state": dict(type="ENV", shape=[2])}),
            "type of input observation.environment_state is 'ENV'; expected 'VISUAL'",
        ),
    ],
)
def test_load_policy_refuses(pretrained, file, edit, message):
    """What would change the robot's actions is refused, naming the file and what is wrong with it, in one line."""
    (edit_json if file.endswith(".json") else edit_tensors)(pretrained / file, edit)
    with pytest.raises(CheckpointError) as caught:
        load_policy(pretrained)
    assert message in str(caught.value) and str(pretrained) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", WEIGHTS, PRE, NORMALIZER, POST, UNNORMALIZER])
def test_load_policy_names_torn_files(pretrained, file):
    """Without a manifest too, a truncated or missing file is named."""
    path = pretrained / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=f"{path}: not readable as"):
        load_policy(pretrained)
    path.unlink()
    name = pretrained if file == "config.json" else path
    with pytest.raises(CheckpointError, match=f"{name}: (missing|no config.json)"):
        load_policy(pretrained)


def test_a_path_that_holds_nothing(tmp_path):
    """The message says what a path may be."""
    with pytest.raises(CheckpointError, match="no config.json, pretrained_model/ or checkpoint_NNNNNN/ here"):
        load_policy(tmp_path / "nothing")


# ---- Kills and full disks ------------------------------------------------------------------------------------

KILLED_SAVES = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # no threads, so that this process may fork
from pathlib import Path
import lerobot_checkpoint as checkpoints
from tests.test_lerobot_checkpoint import CAMERAS, make_run

assert "lerobot" not in sys.modules
run, out = make_run(CAMERAS["one camera"]), Path(sys.argv[1])

def save(step, marker):
    run["model_state"]["action_head.bias"].fill_(marker)
    run["training_state"] = dict(marker=marker)
    checkpoints.save_checkpoint(out, step, **run)

def loadable():
    # The marker of what a run would load now; weights and training state have to be of the same save.
    newest = checkpoints.newest_checkpoint(out)
    policy = checkpoints.load_policy(out)
    assert policy.path.parent == newest.resolve(), (policy.path, newest)
    marker = checkpoints.load_training_state(newest)["marker"]
    assert (policy.model.action_head.bias == marker).all()
    return marker

def fork_and_kill(child, delay=None):
    # Run child() in a fork that is killed after `delay` seconds, or kills itself; True if it was killed.
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

def check_leftovers():
    checkpoints.clean_leftovers(out)
    assert (out / "last").exists()
    assert not [p.name for p in out.iterdir() if p.name.startswith(".tmp") or p.name.endswith(".old")]
"""


def run_killed_saves(script: str, out: Path) -> str:
    """Run KILLED_SAVES and `script`. It also asserts that saving and loading import no lerobot: a robot has none."""
    return subprocess.run(
        [sys.executable, "-c", KILLED_SAVES + textwrap.dedent(script), str(out)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=200,
    ).stdout


def test_kill_before_every_step_on_the_disk(tmp_path):
    """Killed before its n-th file operation, for every n, a save that replaces its own step loses nothing."""
    out = run_killed_saves(
        """
        OPERATIONS = ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir")
        def kill_before(n):
            left = n
            def hook(event, arguments):
                nonlocal left
                if event in OPERATIONS and str(out) in str(arguments[0]):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)

        save(1, 0)
        marker, n, killed, outcomes = 0, 0, True, set()
        while killed:
            n += 1
            killed = fork_and_kill(lambda: (kill_before(n), save(1, n)))
            found = loadable()
            assert found in (marker, n), (found, marker, n)
            outcomes.add(found == n)
            marker = found
            check_leftovers()
        assert outcomes == {True, False}  # some kills came before the new one was in place, some after
        print(n)
        """,
        tmp_path / "out",
    )
    assert int(out) > 20  # there were that many operations to be killed before


def test_kill_at_random_moments(tmp_path):
    """Killed with SIGKILL at ten random moments of a loop of saves, a loadable `last` remains every time."""
    run_killed_saves(
        """
        save(1, 1)
        def train():
            step = checkpoints.list_checkpoints(out)[-1].name.removeprefix("checkpoint_")
            for step in range(int(step) + 1, 10**6):
                save(step, step)
                checkpoints.prune(out, keep=2)
        random.seed(0)
        marker = 1
        for _ in range(10):
            assert fork_and_kill(train, delay=random.uniform(0.1, 1.2))
            assert loadable() >= marker
            marker = loadable()
            check_leftovers()
        assert marker > 1
        """,
        tmp_path / "out",
    )


def test_full_disk_leaves_earlier_checkpoints_alone(run, tmp_path):
    """With no space left: one clear line, no temporary files, and the earlier checkpoint and `last` as they were."""
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", out], capture_output=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        first = save_checkpoint(out, 1, **run)  # 45 MB
        if mounted.returncode != 0:  # no right to mount: no file may grow beyond 1 MB, which fails the same way
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(out, 2, **run)
        message = str(caught.value)
        assert message.startswith(f"{out / 'checkpoint_000002'}: not written (") and "\n" not in message
        assert "No space left on device" in message or mounted.returncode != 0
        with pytest.raises(CheckpointError, match="not written"):
            save_checkpoint(out, 1, **run)  # nor is a checkpoint lost that was to be replaced
        assert sorted(p.name for p in out.iterdir()) == ["checkpoint_000001", "last"]
        checkpoints.verify_checkpoint(first)
        assert load_policy(out).path.parent == first
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted.returncode == 0:
            subprocess.run(["umount", out], check=True)


def test_output_directory_that_cannot_be_one(run, tmp_path):
    """A file where the output directory should be is a CheckpointError, like every failure."""
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="checkpoint_000001: not written"):
        save_checkpoint(tmp_path / "out", 1, **run)


def test_last_that_is_a_directory_is_not_replaced(run, tmp_path):
    """Where a download turned the link into a directory: refused by name, and the checkpoint itself is complete."""
    (tmp_path / "last").mkdir()
    with pytest.raises(CheckpointError, match="last: cannot point it at checkpoint_000001"):
        save_checkpoint(tmp_path, 1, **run)
    checkpoints.verify_checkpoint(tmp_path / "checkpoint_000001")
    assert not list(tmp_path.glob(".tmp-*"))


# ---- The output directory ------------------------------------------------------------------------------------


@pytest.fixture
def outputs(saved_once, tmp_path) -> Path:
    """Four checkpoints' directories; only names matter here."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint_{step:06d}" / "pretrained_model").mkdir(parents=True)
    return tmp_path


def test_prune_never_removes_what_links_point_at(outputs):
    """The newest `keep` stay, and whatever `last` and `best` point at."""
    checkpoints.point_link(outputs, "best", outputs / "checkpoint_000001")
    checkpoints.point_link(outputs, "last", outputs / "checkpoint_000002")
    removed = checkpoints.prune(outputs, keep=1)
    assert [p.name for p in removed] == ["checkpoint_000003"]
    assert sorted(p.name[-1] for p in outputs.glob("checkpoint_*")) == ["1", "2", "4"]
    checkpoints.point_link(outputs, "best", outputs / "checkpoint_000004")
    assert [p.name for p in checkpoints.prune(outputs, keep=2)] == ["checkpoint_000001"]
    assert not list(outputs.glob(".tmp-*"))
    with pytest.raises(CheckpointError, match="asked to keep 0"):
        checkpoints.prune(outputs, keep=0)


def test_links_point_at_checkpoints_only(outputs):
    """A link to nothing is refused; a link that exists is replaced."""
    with pytest.raises(CheckpointError, match="checkpoint_000009 is not there"):
        checkpoints.point_link(outputs, "best", outputs / "checkpoint_000009")
    for step in (1, 2):
        checkpoints.point_link(outputs, "best", outputs / f"checkpoint_{step:06d}")
    assert os.readlink(outputs / "best") == "checkpoint_000002"


def test_leftovers_are_cleaned(outputs):
    """Temporary names go; an .old whose successor never arrived is put back, another one goes."""
    (outputs / ".tmp-checkpoint_000005-1" / "pretrained_model").mkdir(parents=True)
    (outputs / ".tmp-last-1").symlink_to("checkpoint_000005")
    os.rename(outputs / "checkpoint_000002", outputs / "checkpoint_000002.old")
    (outputs / "checkpoint_000003.old").mkdir()
    names = [p.name for p in checkpoints.list_checkpoints(outputs)]
    assert names == ["checkpoint_000001", "checkpoint_000002.old", "checkpoint_000003", "checkpoint_000004"]
    assert checkpoints.clean_leftovers(outputs) == [
        ".tmp-checkpoint_000005-1", ".tmp-last-1", "checkpoint_000002.old", "checkpoint_000003.old",
    ]  # fmt: skip
    assert sorted(p.name for p in outputs.iterdir()) == [f"checkpoint_00000{step}" for step in (1, 2, 3, 4)]
    assert checkpoints.clean_leftovers(outputs) == []
