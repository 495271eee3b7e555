"""The configuration: one schema, typed overrides, one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import train
from act_model import ACTConfig
from rosbag_dataset import BagError, BagSettings, episodes, load_episodes
from tests.bags import settings
from tests.mlflow_server import MlflowServer
from tests.tiny import ROOT, run
from train import Config, ConventionsConfig, DataConfig, ModelConfig, TrainingConfig, load_config
from training.augment import AugmentationConfig
from training.errors import ConfigError
from training.trackers import MlflowConfig, WandbConfig

PACKAGES = ("training", "rosbag_dataset", "lerobot_checkpoint")
SOURCES = sorted([*ROOT.glob("*.py"), *(file for name in PACKAGES for file in (ROOT / name).glob("*.py"))])


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def all_keys() -> list[str]:
    return [f"{s.name}.{f.name}" for s in dataclasses.fields(Config) for f in dataclasses.fields(s.default_factory)]


# -- the schema and config.yaml


def test_config_yaml_shows_every_key_with_the_schemas_default():
    """config.yaml is the schema, written out: same keys, same order, same values."""
    shown = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert [f"{section}.{name}" for section, values in shown.items() for name in values] == all_keys()
    defaults = dataclasses.asdict(Config())
    for dotted in all_keys():
        section, name = dotted.split(".")
        assert shown[section][name] == defaults[section][name], dotted


def test_config_yaml_says_what_the_less_obvious_keys_mean():
    """Keys with a unit or a choice carry it in a comment."""
    text = (ROOT / "config.yaml").read_text()
    for section in dataclasses.fields(Config):
        for spec in dataclasses.fields(section.default_factory):
            line = re.search(rf"^  {spec.name}: .*$", text, re.M).group()
            for choice in spec.metadata["choices"]:
                assert choice in line, line
            for unit in ("Hz", "ms", "pixels"):
                if re.search(rf"\b{unit}\b", spec.metadata["doc"]):
                    assert unit in line, line


def test_an_empty_config_and_config_yaml_mean_the_same(tmp_path: Path):
    """Defaults live once: leaving a key out and writing its default are the same."""
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    assert load_config(write(tmp_path, "")) == load_config(tmp_path / "config.yaml")


# The sections, and what is made of them.
READ_FROM = {
    DataConfig: "data", ConventionsConfig: "conventions", AugmentationConfig: "augmentation", ModelConfig: "model",
    TrainingConfig: "training", WandbConfig: "wandb", MlflowConfig: "mlflow", ACTConfig: "model",
    BagSettings: "data and conventions",
}  # fmt: skip
# Functions that read settings without doing what they say: they copy them, check them, or name a cache entry by them.
NO_USE = {"__post_init__", "act_config", "cache_key", "check_settings", "episode_rules", "read_settings", "_set",
          "__eq__", "__hash__"}  # fmt: skip
SWITCHED_ON = {
    "data__command_topics": "{elbow_joint: '/joint_states:position[elbow_joint]'}",  # a topic that is there
    "conventions__apply_joint_sign": "true", "augmentation__enabled": "true", "wandb__enabled": "true",
    "mlflow__enabled": "true",
    "training__scheduler": "cosine", "training__warmup_steps": 1, "training__steps": 2, "training__save_freq": 1,
    "training__val_fraction": 0.2, "training__keep_checkpoints": 1, "model__n_action_steps": 1,
    "training__ema_decay": 0.5,
    "model__temporal_ensemble_coeff": 0.02, "data__episodes": "still", "data__trim_still_s": 0.2,
}  # fmt: skip
# Of these one excludes the other: each is read where data.episodes says so.
CUT_OTHERWISE = ({"episodes": "marker", "episode_marker_topic": "/marker"}, {"episodes": "file"})


@pytest.mark.xdist_group("mlflow")
def test_every_key_is_read(
    sample_bags: Path, tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
):
    """A knob that is accepted, logged and read nowhere would be a lie. A short run in which everything is switched on
    reads each of them, from its own section or from what is made of it, or writes it down for the robot."""
    read: set[str] = set()

    def spy(self: object, name: str) -> object:
        reader = sys._getframe(1).f_code
        if reader.co_name not in NO_USE and reader.co_filename != dataclasses.__file__:
            read.update(f"{section}.{name}" for section in READ_FROM[type(self)].split(" and "))
        return object.__getattribute__(self, name)

    for made_of_settings in READ_FROM:
        monkeypatch.setattr(made_of_settings, "__getattribute__", spy)
    monkeypatch.setattr(episodes, "build_entries", lambda *args: ([], []))  # bags are decoded in this process, then
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    output = run(sample_bags, tmp_path, data__cache_dir=tmp_path / "cache", **SWITCHED_ON)
    config = json.loads((output / "last/pretrained_model/config.json").read_text())
    shutil.copytree(sample_bags / "episode_000", tmp_path / "bags/a")
    (tmp_path / "bags/a/episodes.yaml").write_text("- {start_s: 0, stop_s: 1, success: false}\n")
    for other in CUT_OTHERWISE:
        with pytest.raises(BagError, match="/marker|success: false"):
            load_episodes(settings(tmp_path / "bags", **other), 1, False)
    read |= {f"model.{key}" for key in ("n_action_steps", "temporal_ensemble_coeff") if config[key] in (1, 0.02)}
    assert set(all_keys()) - read == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_survive_being_rendered_as_templates(path: Path):
    """OSMO injects these modules as files and renders them as templates: no template openers, less than 1 MiB."""
    text = path.read_text()
    assert not re.search(r"\{[{%#]", text)
    assert len(text.encode()) < 1 << 20


# -- types


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.lr=5e-5", 5e-5),
        ("training.lr=1", 1.0),
        ("training.lr=1.0e-5", 1e-5),
        ("training.steps=12", 12),
        ("training.min_lr=.5e-7", 0.5e-7),
        ("wandb.enabled=true", True),
        ("wandb.enabled=False", False),
        ("wandb.run_name=001", "001"),
        ("wandb.run_name=true", "true"),
        ("wandb.run_name=null", None),
        ("wandb.run_name=a=b", "a=b"),
        ("wandb.project=1e5", "1e5"),
        ("wandb.tags=[sweep, 2]", ["sweep", "2"]),
        ("conventions.image_resize=[240, 320]", [240, 320]),
        ("conventions.image_resize=null", None),
        ("conventions.joint_sign=[1, -1, 1, 1, 1, 1.0]", [1.0, -1.0, 1.0, 1.0, 1.0, 1.0]),
        ("data.camera_topics={color: /a, wrist: /b}", {"color": "/a", "wrist": "/b"}),
        ("model.temporal_ensemble_coeff=null", None),
        ("model.pretrained_backbone=false", False),
    ],
)
def test_override_types(override: str, value: object):
    """The schema decides the type; text stays the raw text, numbers may be written either way."""
    section, name = override.split("=")[0].split(".")
    found = getattr(getattr(load_config(ROOT / "config.yaml", [override]), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("number", ["1e-5", "1.0e-5", "0.00001"])
def test_a_file_may_write_floats_as_people_do(tmp_path: Path, number: str):
    """PyYAML reads 1e-5 as text; here it is the number everyone means."""
    assert load_config(write(tmp_path, f"training:\n  lr: {number}\n")).training.lr == 1e-5


def test_a_file_keeps_raw_text_and_accepts_integers_for_floats(tmp_path: Path):
    """run_name: 001 is not the number 1; fps: 25 is the rate 25.0."""
    cfg = load_config(write(tmp_path, "wandb:\n  run_name: 001\ndata:\n  fps: 25\n"))
    assert cfg.wandb.run_name == "001"
    assert cfg.data.fps == 25.0 and isinstance(cfg.data.fps, float)


def test_old_configs_without_newer_sections_run_unchanged(tmp_path: Path):
    """No wandb section, no scheduler keys, an empty section: defaults."""
    cfg = load_config(write(tmp_path, "data:\n  fps: 30\ntraining:\n  steps: 10\nconventions:\n"))
    assert not cfg.wandb.enabled and cfg.training.scheduler == "none" and cfg.training.steps == 10


def test_later_overrides_win():
    """Overrides apply in the order given."""
    assert load_config(ROOT / "config.yaml", ["training.steps=1", "training.steps=2"]).training.steps == 2


# -- paths


def test_paths_in_a_file_are_relative_to_it_and_on_the_command_line_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both people who write configs and people who type commands get what they mean; defaults count as written."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(tmp_path / "configs", "data:\n  bag_dir: bags\nmodel:\n  pretrained_backbone: w.pth\n")
    cfg = load_config(path, ["training.output_dir=out", "data.cache_dir=/abs/cache", "training.resume=ck"])
    assert cfg.data.bag_dir == str(tmp_path / "configs/bags")
    assert cfg.model.pretrained_backbone == str(tmp_path / "configs/w.pth")
    assert cfg.training.output_dir == str(tmp_path / "elsewhere/out")
    assert cfg.training.resume == str(tmp_path / "elsewhere/ck")
    assert cfg.data.cache_dir == "/abs/cache"
    default = load_config(write(tmp_path / "configs", ""))
    assert default.data.bag_dir == str(tmp_path / "rosbag-to-lerobot/local_bags")
    assert default.training.resume == "never" and default.model.pretrained_backbone is True


# -- mistakes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lrr=1", ["unknown key training.lrr", "training.lr?"]),
        ("trainig.lr=1", ["unknown key trainig.lr", "training.lr?"]),
        ("lr=1", ["unknown key lr", "training.lr?"]),
        ("training.steps", ["expected key=value"]),
        ("training.steps=many", ["training.steps", "'many'", "whole number"]),
        ("training.steps=1.5", ["training.steps", "'1.5'", "whole number"]),
        ("training.lr=fast", ["training.lr", "'fast'", "a number"]),
        ("training.lr=nan", ["training.lr", "a number"]),
        ("training.batch_size=-1", ["training.batch_size", "'-1'", "at least 1"]),
        ("training.scheduler=linear", ["training.scheduler", "none, cosine"]),
        ("wandb.enabled=yes", ["wandb.enabled", "'yes'", "true or false"]),
        ("conventions.image_resize=[240]", ["image_resize", "[height, width]"]),
        ("conventions.image_resize=240", ["image_resize", "list of whole numbers"]),
        ("conventions.image_resize=[240, 320", ["not valid YAML"]),
        ("conventions.joint_sign=[1, 1, 1, 1, 1, 2]", ["joint_sign", "+1 or -1"]),
        ("model.state_dim=7", ["model.state_dim", "found 7", "6"]),
        ("model.n_action_steps=101", ["n_action_steps", "chunk_size 100"]),
        ("model.temporal_ensemble_coeff=0.01", ["n_action_steps", "temporal_ensemble_coeff"]),
        ("model.n_heads=7", ["dim_model", "n_heads 7"]),
        ("data.camera_topics={a b: /x}", ["camera_topics", "letters"]),
        ("training.val_fraction=1", ["val_fraction", "below 1"]),
    ],
)
def test_a_wrong_override_is_one_clear_line(override: str, words: list[str]):
    """Which key, what was found, what was expected; never a silent default."""
    with pytest.raises(ConfigError) as error:
        load_config(ROOT / "config.yaml", [override])
    line = str(error.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n\tsteps: 4\n", ["line 2", "tabs"]),
        ("training: [1, 2]\n", ["training", "section of keys"]),
        ("- a\n- b\n", ["expected sections"]),
        ("training: {steps: 4", ["not valid YAML"]),
        ("trainin:\n  steps: 4\n", ["unknown key trainin", "training?"]),
        ("training:\n  stepz: 4\n", ["unknown key training.stepz", "training.steps?"]),
        ("training:\n  steps: 4\n  steps: 5\n", ["'steps' given twice", "line 3"]),
        ("training:\n  steps: [4]\n", ["training.steps", "a list", "whole number"]),
        ("data:\n  joint_names: shoulder\n", ["joint_names", "'shoulder'", "list"]),
        ("training:\n  scheduler: cosine\n  steps: 100\n", ["warmup_steps", "500", "100"]),
    ],
)
def test_a_wrong_file_is_one_clear_line_that_names_it(tmp_path: Path, text: str, words: list[str]):
    """The file and the key or line are named."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    line = str(error.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
    if "warmup_steps" not in words:
        assert str(path) in line


def test_a_missing_config_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Through the command line: exit 1, the path, no traceback."""
    assert train.main(["--config", str(tmp_path / "no.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "no.yaml" in error
