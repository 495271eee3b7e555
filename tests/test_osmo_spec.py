"""osmo/'s workflows as text: a real OSMO accepts them, and they say what they mean. Nothing is run here.

What OSMO does with a workflow file, and what it accepts, is in osmo_spec.py; test_osmo_runs.py and its neighbours run
the commands.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ur10e_deploy import offline_eval

import train
from tests.osmo_modules import COMMAND, imported_modules, modules
from tests.osmo_spec import (
    GUIDE,
    GUIDES,
    VERSIONS,
    SpecError,
    check,
    filled_in,
    head_commands,
    inline_settings,
    load,
    osmo_commands,
    parse_cli,
    place,
    readme_commands,
    render,
    sections,
    submit,
    tasks,
)  # fmt: skip
from tests.tiny import ROOT
from training.grid import EXAMPLE, parse_grid

OSMO = ROOT / "osmo"
WORKFLOWS = sorted(OSMO.glob("osmo-workflow*.yaml"))
STORAGE = "storage_url=azure://account/container/prefix"
BAGS = "../rosbag-to-lerobot/local_bags"  # where the documents have the recordings
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem.removeprefix("osmo-workflow"))


def training_tasks(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [task for task in tasks(spec) if task["name"] not in ("eval-act", "compare-arms")]


def overrides(task: dict[str, Any]) -> list[str]:
    """The trainer's settings, in order."""
    return [a.removeprefix("--override=") for a in task["args"] if a.startswith("--override=")]


def config_of(workflow: Path) -> Path:
    """What its training tasks get as /workspace/config.yaml."""
    return OSMO / ("osmo-config-ddp.yaml" if "ddp" in workflow.name else "osmo-config.yaml")


def test_the_six_workflows_are_there():
    names = ["-blob", "-ddp", "-sweep", "-train-eval", "-wandb", ""]
    assert [path.name for path in WORKFLOWS] == [f"osmo-workflow{name}.yaml" for name in names]


# -- accepted -----------------------------------------------------------------------------------------------------


@each_workflow
@pytest.mark.parametrize("version", VERSIONS)
def test_accepted_with_a_storage_url(path: Path, version: str):
    check(submit(path, STORAGE), version)


@each_workflow
def test_s3_is_storage_too(path: Path):
    """docs/osmo-administrator.md says so; tests/real_osmo.py asks OSMO itself."""
    check(submit(path, "storage_url=s3://bucket/prefix"), "6.3.1")


@each_workflow
def test_datasets_by_default_until_6_4_removed_them(path: Path):
    spec = submit(path)
    check(spec, "6.2.8")
    check(spec, "6.3.1")
    with pytest.raises(SpecError, match="found .*dataset"):
        check(spec, "6.4")
    assert "azure://" not in str([task | {"files": []} for task in tasks(spec)])


@each_workflow
@pytest.mark.parametrize("storage", [(), (STORAGE,)], ids=["datasets", "storage_url"])
def test_accepted_with_everything_set(path: Path, storage: tuple[str, ...]):
    """What a user may set arrives: image, resources, steps, overrides; --set turns 10 into a number, 1e-5 too."""
    changes = ["image=registry/a:1", "eval_image=registry/b:1", "steps=10", "cpu=4", "memory=8Gi", "storage=9Gi"]
    changes += ["platform=p", "exec_timeout=2d", "overrides=training.lr=5e-5 conventions.image_resize=[240,320]"]
    spec = submit(path, *storage, *changes)
    check(spec, "6.3.1")
    assert {task["image"] for task in tasks(spec)} <= {"registry/a:1", "registry/b:1"}
    resource = spec["workflow"]["resources"]["default"]
    assert resource == resource | {"cpu": "4", "memory": "8Gi", "storage": "9Gi", "platform": "p"}
    assert spec["workflow"]["timeout"]["exec_timeout"] == "2d"
    for task in training_tasks(spec):
        assert overrides(task)[-3:] == ["training.steps=10", "training.lr=5e-5", "conventions.image_resize=[240,320]"]
    plain = submit(path, *storage)
    assert not any("training.steps" in o for task in training_tasks(plain) for o in overrides(task))
    assert "platform" not in plain["workflow"]["resources"]["default"]


@each_workflow
def test_loads_as_plain_yaml_and_opens_with_its_submit_command(path: Path):
    """Editors and linters can read it unrendered; the first comment can be copied."""
    text = path.read_text()
    assert set(yaml.safe_load(text)) == {"version", "workflow", "default-values"}
    comment = text[: text.index("version:")]
    assert f"osmo workflow submit osmo/{path.name} --pool POOL" in comment
    assert all(line.startswith("#") for line in comment.strip().splitlines())


SEED_FORMS = {  # forms that the first documents had, or that OSMO lets pass and that cannot be meant
    "an unknown field": lambda t: t.update(gpus=1),
    "groups inside a task": lambda t: t.update(groups=[{"name": "workers", "count": 4}]),
    "a secret's name as the variable": lambda t: t.update(credentials={"AZURE_STORAGE_SAS": {"secret": "my-sas"}}) or
    t["credentials"]["AZURE_STORAGE_SAS"].update({"not a variable": "x"}),
    "a file that is not there any more": lambda t: t["files"].append({"localpath": "x.py", "path": "/workspace/x.py"}),
    "two files in one place": lambda t: t["files"].append({**t["files"][0], "contents": "x"}),
    "the same file in two packages": lambda t: t["files"].extend(
        {"path": f"/workspace/{package}/__init__.py", "contents": ""} for package in "ab"
    ),
    "a file for OSMO's own folder": lambda t: t["files"].append({"path": "/osmo/x", "contents": ""}),
    "a file too large for a secret": lambda t: t["files"].append({"path": "/x", "contents": "x" * 2**20}),
    "a boolean among the arguments": lambda t: t["args"].append(True),
    "a token with no task": lambda t: t["args"].append("{{host:typo}}"),
    "a token with no input": lambda t: t["args"].append("{{input:9}}"),
    "an input from a task that is not there": lambda t: t["inputs"].append({"task": "later"}),
    "an url of another kind": lambda t: t["inputs"].append({"url": "https://account.blob.core.windows.net/c"}),
    "both kinds of input in one": lambda t: t["inputs"].append({"url": "azure://a/b", "dataset": {"name": "x"}}),
    "an action that does not exist": lambda t: t["exitActions"].update(RESTART="75"),
    "exit codes with spaces": lambda t: t["exitActions"].update(RESCHEDULE="75, 3004"),
    "a name that ends in a dash": lambda t: t.update(name="train-"),
    "no command": lambda t: t.pop("command"),
}  # fmt: skip


@pytest.mark.parametrize("damage", SEED_FORMS.values(), ids=list(SEED_FORMS))
def test_the_model_refuses(damage):
    """A check that accepts everything would make the tests above worthless."""
    spec = submit(OSMO / "osmo-workflow.yaml")
    check(spec, "6.3.1")
    damage(spec["workflow"]["tasks"][0])
    with pytest.raises(SpecError):
        check(spec, "6.3.1")


WORKFLOW_DAMAGE = {
    "memory in GB": lambda w: w["resources"]["default"].update(memory="32GB"),
    "half a cpu": lambda w: w["resources"]["default"].update(cpu=0.5),
    "two units": lambda w: w["timeout"].update(exec_timeout="1h30m"),
    "labels, which only 6.4 knows": lambda w: w.update(labels={"a": "b"}),
    "names that differ in upper case only": lambda w: w["tasks"].append({**w["tasks"][0], "name": "Train_Act"}),
    "21 tasks": lambda w: w.update(tasks=[{**w["tasks"][0], "name": f"t{i}"} for i in range(21)]),
    "a group beside tasks": lambda w: w.update(groups=[{"name": "g", "tasks": copy.deepcopy(w["tasks"])}]),
    "no lead": lambda w: w.update(groups=[{"name": "g", "tasks": [{**w["tasks"][0], "name": n} for n in "ab"]}])
    or w.pop("tasks"),
}  # fmt: skip


@pytest.mark.parametrize("damage", WORKFLOW_DAMAGE.values(), ids=list(WORKFLOW_DAMAGE))
def test_the_model_refuses_workflows(damage):
    spec = submit(OSMO / "osmo-workflow.yaml")
    damage(spec["workflow"])
    with pytest.raises(SpecError):
        check(spec, "6.3.1")


def test_the_model_refuses_a_localpath_beside_injected_files(tmp_path: Path):
    """As these workflows once were, and as OSMO 6.2.8 and 6.3.1 refuse it; each of the two alone is accepted."""
    shutil.copytree(OSMO, tmp_path / "osmo")
    path = tmp_path / "osmo/osmo-workflow.yaml"
    name = '        name: "{{ recordings }}"\n'
    path.write_text(path.read_text().replace(name, f'{name}        localpath: "../bags"\n'))
    with pytest.raises(SpecError, match="localpath and injected files in one workflow.*contents: field required"):
        submit(path)
    check(submit(path, "modules=", STORAGE), "6.3.1")
    path.write_text(re.sub(r"    files:\n(    .*\n)+", "", path.read_text()))
    (task,) = tasks(submit(path))
    assert task["inputs"] == [{"dataset": {"name": "ur10e-rosbags", "localpath": "../bags"}}] and "files" not in task
    check(submit(path), "6.3.1")


@pytest.mark.parametrize("text", ["{{ typo }}", "{% if typo %}{% endif %}", "{{ steps.typo }}", "{{ output }}"])
def test_rendering_is_strict(text: str):
    """A name that is no default value stops the submission; so does a token written with spaces."""
    with pytest.raises(SpecError, match="undefined|has no attribute"):
        render(text, {"steps": "1"})


# -- injected files -----------------------------------------------------------------------------------------------


@each_workflow
def test_the_injected_files_are_complete(path: Path):
    """The trainer with every module of ours that it imports, the script, the config; each where the command is."""
    unread = load(render(*sections(path.read_text())))
    wanted = set(modules())
    for task in training_tasks(unread):
        local = {f["path"].removeprefix("/workspace/"): OSMO / f["localpath"] for f in task["files"]}
        ours = {name for name in local if name.endswith(".py") and not (OSMO / name).is_file()}
        assert ours == wanted, f"to put this right: {COMMAND}"
        assert all((ROOT / name).samefile(local[name]) for name in wanted), "the same place here and there"
        words = task["command"] + [word.rpartition("=")[2] for word in task["args"]]
        scripts = {word.removeprefix("/workspace/") for word in words if re.match("/workspace/.*[.]sh$", word)}
        evaluates = any(word.startswith("--eval-") for word in task["args"])
        scripts |= {"heartbeat.py", "uploads.py"} | ({"eval-entrypoint.sh"} if evaluates else set())
        downloads = any(word.startswith("--download") for word in task["args"])
        scripts |= {"check_settings.py"} if evaluates or downloads else set()
        assert set(local) == wanted | scripts | {"config.yaml"}
        assert local["config.yaml"] == config_of(path)


def injected_files() -> list[Path]:
    """Every file that some workflow injects: modules, scripts, configs."""
    specs = [load(render(*sections(path.read_text()))) for path in WORKFLOWS]
    local = [file["localpath"] for spec in specs for task in training_tasks(spec) for file in task["files"]]
    return sorted({(OSMO / path).resolve() for path in local})


@pytest.mark.parametrize("path", injected_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_injected_files_hold_nothing_that_a_template_engine_would_take(path: Path):
    """OSMO renders them, too, and replaces its tokens: a doubled brace stops the submission, or changes the code."""
    text = path.read_text()
    assert not re.search(r"\{\{|\{%|\{#", text)
    assert "default-values:" not in text


def test_an_injected_brace_would_be_noticed(tmp_path: Path):
    """The guard above and the second rendering agree: what one forbids, the other trips over."""
    for name in modules():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "osmo").mkdir()
    for path in OSMO.iterdir():
        if path.is_file():
            (tmp_path / "osmo" / path.name).write_bytes(path.read_bytes())
    submit(tmp_path / "osmo/osmo-workflow.yaml")
    for damage in ('f"{{x}}"', "{% raw %}", "${#array[@]}", "{{output}}{#x#}"):
        (tmp_path / "act_model.py").write_text(f"# {damage}\n")
        with pytest.raises(SpecError):
            submit(tmp_path / "osmo/osmo-workflow.yaml")


@each_workflow
def test_small_enough_to_be_rendered_in_time(path: Path):
    """OSMO renders what is submitted, injected files and all, within 0.5 s, and 2.3 MB take it half of that. Nodes and
    a sweep's runs share their files, which the CLI sends once (YAML keeps an alias)."""
    text, _ = filled_in(path, "n_nodes=8")
    assert len(text) < 1_000_000
    if path.stem.endswith("ddp"):
        spec = submit(path, "n_nodes=8")
        assert len(tasks(spec)) == 8 and all(task["files"] == tasks(spec)[0]["files"] for task in tasks(spec))
        assert tasks(spec)[7]["files"][0]["contents"] == (ROOT / "act_model.py").read_text()


# -- the same in all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [(), (STORAGE,)], ids=["datasets", "storage_url"])
def test_what_the_workflows_share_is_the_same(storage: tuple[str, ...]):
    """Image, resources, timeouts, exit actions, injected files, the way results are stored, defaults."""
    shared: dict[str, dict[str, Any]] = {}
    for path in WORKFLOWS:
        spec = submit(path, *storage)
        for task in training_tasks(spec):
            lead = "ddp" not in path.name or task.get("lead", False)
            inputs = [i for i in task.get("inputs", []) if "rosbags" in str(i)]
            own = ("config.yaml", "download-blob.sh", "eval-entrypoint.sh", "check_settings.py", "uploads.py")
            uploads = [word for word in task["args"] if word.startswith("--upload-to=")]
            text = str([task.get("outputs"), uploads]) if lead else "nothing"
            shared[f"{path.name} {task['name']}"] = {
                "image": task["image"],
                "resources": spec["workflow"]["resources"],
                "timeout": spec["workflow"]["timeout"],
                "exit actions": task["exitActions"],
                "files": [f for f in task["files"] if Path(f["path"]).name not in own],
                "bags": inputs if "blob" not in path.name else None,
                "output": re.sub("sweep-lr[0-9e]*-kl[0-9]*", "checkpoint", text),
            }
    first = shared["osmo-workflow.yaml train-act"]
    for where, values in shared.items():
        for name, value in values.items():
            if value not in (None, "nothing"):
                assert value == first[name], f"{name} of {where}"
    evaluation = tasks(submit(OSMO / "osmo-workflow-train-eval.yaml", *storage))[1]
    assert evaluation["exitActions"] == first["exit actions"]


@pytest.mark.parametrize("storage", [(), (STORAGE,)], ids=["datasets", "storage_url"])
@each_workflow
def test_every_variant_runs_the_base_command(path: Path, storage: tuple[str, ...]):
    """Word by word, but for what makes it a variant; so what the base workflow's runs show holds for all of them."""
    changes = [*storage, "steps=10", "overrides=training.batch_size=2"]

    own = r"--(bags|gpus|workflow|download|eval-|output|upload-to|override=(wandb\.|training\.(lr|kl_weight)=))"

    def words(task: dict[str, Any]) -> list[str]:
        given = task["command"] + task["args"]
        return [word.replace("{{input:0}}", "{{input:1}}") for word in given if not re.match(own, word)]

    base = words(tasks(submit(OSMO / "osmo-workflow.yaml", *changes))[0])
    start = base.index("python")
    for task in training_tasks(submit(path, *changes)):
        found = words(task)
        assert ("--download=/workspace/download-blob.sh" in task["args"]) is ("blob" in path.name)
        if "ddp" in path.name:
            assert [w.split("=")[0] for w in found if w not in base] == [
                "torchrun", "--nnodes", "--nproc_per_node", "--node_rank", "--master_addr", "--master_port"
            ]  # fmt: skip
            found = ["python" if w == "torchrun" else w for w in found if w == "torchrun" or w in base]
            if not task.get("lead"):
                found[2:2] = [word for word in base[2:start] if word not in found]
        assert found == base, path.name


@each_workflow
def test_what_is_no_fault_of_the_run_is_rescheduled(path: Path):
    """Stopped after saving (75), its node lost or drained (3001), evicted (3004), preempted (3006)."""
    for task in tasks(submit(path)):
        assert task["exitActions"] == {"RESCHEDULE": "75,3001,3004,3006"}, task["name"]


def test_default_values_are_the_same():
    defaults = {path.name: sections(path.read_text())[1] for path in WORKFLOWS}
    for name in set.union(*map(set, defaults.values())):
        values = {file: d[name] for file, d in defaults.items() if name in d}
        assert len({str(v) for v in values.values()}) == 1, f"{name}: {values}"


@each_workflow
def test_every_default_value_is_used(path: Path):
    """A --set that changes nothing would be a knob that is read nowhere."""
    workflow, defaults = sections(path.read_text())
    for name in defaults:
        assert re.search(rf"{{[{{%][^}}]*\b{name}\b[^}}]*}}", workflow), name


KEY_SETTINGS = {  # those that the guide's tables name, for a person to edit: there even where they are the defaults
    *(f"training.{key}" for key in ("steps", "batch_size", "lr", "scheduler", "warmup_steps", "min_lr")),
    *("model.chunk_size", "data.fps", "wandb.enabled", "wandb.project", "wandb.run_name", "wandb.tags"),
}


def value_of(config: train.Config, dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    return getattr(getattr(config, section), key)


def settings_in(path: Path) -> dict[str, Any]:
    """Every key of a config with the value that train.py takes from it."""
    config = train.load_config(path)
    keys = [f"{section}.{key}" for section, values in load(path.read_text()).items() for key in values]
    return {key: value_of(config, key) for key in keys}


def test_the_configs_hold_the_key_settings_and_what_differs_from_the_trainer():
    """And this is the whole list. That for several GPUs has larger batches and more loader processes."""
    base = settings_in(OSMO / "osmo-config.yaml")
    assert base == {key: value_of(train.Config(), key) for key in KEY_SETTINGS} | {
        "data.bag_dir": "/data/rosbags",
        "data.cache_dir": "/data/frame-cache",
        "training.output_dir": "/output/train-rosbag-act",
        "training.device": "cuda",
        "training.keep_checkpoints": 3,
        "wandb.tags": ["osmo"],
    }
    several = settings_in(OSMO / "osmo-config-ddp.yaml")
    assert several == base | {"training.num_workers": 4, "training.batch_size": 8}
    nodes = sections((OSMO / "osmo-workflow-ddp.yaml").read_text())[1]
    factors = several["training.batch_size"], nodes["n_nodes"], nodes["gpus_per_node"]
    named = "{} x {} x {} = {}".format(*factors, math.prod(factors))
    assert named in (OSMO / "osmo-config-ddp.yaml").read_text(), "the effective batch"


def test_the_guide_has_the_key_settings_with_their_defaults():
    """Its tables of settings show every key that the configs do, with the value that it has there."""
    rows = re.findall(r"^\| `(\w+\.\w+)` \| ([^|]+) \|", GUIDE.read_text(), re.MULTILINE)
    assert {key for key, _ in rows} == KEY_SETTINGS | {"training.num_workers"}
    for key, shown in rows:
        one, _, several = shown.partition(", with several GPUs ")
        for name, value in (("osmo-config.yaml", one), ("osmo-config-ddp.yaml", several or one)):
            assert value_of(train.load_config(OSMO / name), key) == value_of(
                train.load_config(OSMO / name, [f"{key}={value}"]), key
            ), f"{key} of {name}"


def test_paths_agree_between_config_script_and_workflows():
    config = train.load_config(OSMO / "osmo-config.yaml")
    script = (OSMO / "train-entrypoint.sh").read_text()
    assert f"\nrun_dir={config.training.output_dir} " in script
    assert f"\nbags_dir={config.data.bag_dir} " in script
    for path in WORKFLOWS:
        for task in training_tasks(submit(path, STORAGE)):
            assert "--config=/workspace/config.yaml" in task["args"]
    blob = tasks(submit(OSMO / "osmo-workflow-blob.yaml"))[0]
    assert blob["environment"]["BLOB_DEST_DIR"] == config.data.bag_dir


@each_workflow
def test_a_run_is_uploaded_once(path: Path):
    """By the script, with a storage url; OSMO's own uploads send all of a run again, at each time. What a later task of
    the workflow reads is its output, the rest is not handed over twice."""
    spec = submit(path, STORAGE)
    for task in training_tasks(spec):
        assert "checkpoint" not in task and "outputs" not in task
        assert sum(word.startswith("--upload-to=") for word in task["args"]) == 1
        follows = "sweep" in path.name or any({"task": task["name"]} in t.get("inputs", []) for t in tasks(spec))
        assert ("--output={{output}}" in task["args"]) is follows
    for task in training_tasks(submit(path)):
        assert not any(word.startswith("--upload-to=") for word in task["args"])
        assert ("--output={{output}}" in task["args"]) is ("dataset" in str(task.get("outputs")))


# -- each variant -------------------------------------------------------------------------------------------------


def test_base_reads_the_recordings_as_a_dataset():
    task = tasks(submit(OSMO / "osmo-workflow.yaml"))[0]
    assert task["inputs"] == [{"dataset": {"name": "ur10e-rosbags"}}]
    assert task["outputs"] == [{"dataset": {"name": "ur10e-act-checkpoint"}}]
    assert task["name"] == "train-act" and task["image"].startswith("ur10e-act-train")


@each_workflow
def test_its_head_uploads_every_dataset_before_it_submits(path: Path):
    """The recordings from the folder that the documents name, beside the repository."""
    made = {s["dataset"]["name"] for t in tasks(submit(path)) for s in t.get("inputs", []) if "dataset" in s}
    commands = [words for words in head_commands(path) if words[1:2] != ["credential"]]
    uploads, submits = [w for w in commands if w[1:3] == ["dataset", "upload"]], ["workflow", "submit"]
    named = {words[3] for words in uploads if any(f"eval_dataset={words[3]}" in each for each in commands)}
    assert {words[3] for words in uploads} == made | named and commands[-1][1:3] == submits
    assert all(words[4:] == [BAGS] for words in uploads if words[3] == "ur10e-rosbags")


def test_the_guide_uploads_the_recordings_before_it_submits():
    """From the folder that all documents name."""
    commands = [words for words in readme_commands(GUIDE) if words[0] == "osmo"]
    upload = commands.index(["osmo", "dataset", "upload", "ur10e-rosbags", BAGS])
    assert upload < min(i for i, words in enumerate(commands) if words[1:3] == ["workflow", "submit"])


def test_a_storage_url_makes_it_resumable():
    """Uploaded while it runs, and read back from the same place by the next attempt; a run of its own by default."""
    task = place(submit(OSMO / "osmo-workflow.yaml", STORAGE), workflow_id="ur10e-act-train-7")["train-act"]
    place_of_run = "azure://account/container/prefix/ur10e-act-checkpoint/ur10e-act-train-7"
    assert task["inputs"][1]["url"] == f"{place_of_run}/"
    assert f"--upload-to={place_of_run}" in task["args"]
    assert "--resume-from=/osmo/data/input/1" in task["args"]
    assert "75" in task["exitActions"]["RESCHEDULE"].split(",")
    named = place(
        submit(OSMO / "osmo-workflow.yaml", STORAGE, "run=ur10e-act-train-7"), workflow_id="ur10e-act-train-8"
    )
    assert named["train-act"]["inputs"] == task["inputs"]


@pytest.mark.parametrize("storage", [(), (STORAGE,)], ids=["datasets", "storage_url"])
@pytest.mark.parametrize("n_nodes", [1, 2, 8])
def test_ddp_is_one_group_of_nodes(n_nodes: int, storage: tuple[str, ...]):
    spec = submit(OSMO / "osmo-workflow-ddp.yaml", f"n_nodes={n_nodes}", "gpus_per_node=2", *storage)
    check(spec, "6.3.1")
    assert spec["workflow"]["groups"][0]["ignoreNonleadStatus"] is False
    assert spec["workflow"]["resources"]["default"]["gpu"] == "2"
    names = ["train-act-ddp", *(f"train-act-ddp-{rank}" for rank in range(1, n_nodes))]
    placed = place(spec, hosts={name: f"address-{rank}" for rank, name in enumerate(names)})
    assert list(placed) == names
    for rank, task in enumerate(placed.values()):
        start = task["args"].index("torchrun")
        assert task["args"][start : start + 7] == [
            "torchrun", f"--nnodes={n_nodes}", "--nproc_per_node=2", f"--node_rank={rank}",
            "--master_addr=address-0", "--master_port=29500", "/workspace/train.py",
        ]  # fmt: skip
        lead = rank == 0
        assert task.get("lead", False) is lead
        assert ("outputs" in task) is ("--output=/osmo/data/output" in task["args"]) is (lead and not storage)
        assert ("--resume-from=/osmo/data/input/1" in task["args"]) is bool(storage)
        if storage:  # the run, or of it what the node itself has said
            name = f"train-rosbag-act/.heartbeat-{rank}.json"
            assert lead or re.fullmatch(task["inputs"][1]["regex"], name)
            assert lead is not ("regex" in task["inputs"][1])


@each_workflow
def test_the_script_gets_what_it_checks(path: Path):
    """Whatever a submission can say wrongly, and OSMO takes, reaches train-entrypoint.sh (test_osmo_runs.py: what it
    refuses). Nothing that is given counts as not given: steps=0 arrives."""
    spec = submit(path, f"{STORAGE}/", "run=1e5", "gpu=4", "steps=0", "overrides=7", "eval_args=7")
    for task in training_tasks(spec):
        given = {"--run=100000.0", f"--storage-url={STORAGE.partition('=')[2]}/", "--override=training.steps=0"}
        given |= {"--override=7"} | ({"--gpus=4"} if "ddp" not in path.name else set())
        given |= {"--eval-option=7"} if "eval" in path.name else set()
        assert given <= set(task["args"])
        assert ("--workflow={{workflow_id}}" in task["args"]) is ("wandb" not in path.name), "there, run is a name, too"


REFUSED_BY_OSMO = {
    "a storage url with a slash at its end": ("osmo-workflow.yaml", f"{STORAGE}/"),
    "two runs of one name": ("osmo-workflow-sweep.yaml", "sweep=lr1:training.lr=1 lr1:training.lr=1.0"),
    "a sweep without names": ("osmo-workflow-sweep.yaml", "sweep=training.lr=1e-5,1e-4"),
    "a timeout without a unit": ("osmo-workflow.yaml", "exec_timeout=24"),
    "a timeout in two units": ("osmo-workflow.yaml", "queue_timeout=1h30m"),
    "memory in GB": ("osmo-workflow.yaml", "memory=32GB"),
    "half a processor": ("osmo-workflow.yaml", "cpu=0.5"),
    "no nodes": ("osmo-workflow-ddp.yaml", "n_nodes=0"),
    "one and a half nodes": ("osmo-workflow-ddp.yaml", "n_nodes=1.5"),
    "a credential that is none": ("osmo-workflow-blob.yaml", "blob_credential=my secret"),
}


@pytest.mark.parametrize("workflow, assignment", REFUSED_BY_OSMO.values(), ids=list(REFUSED_BY_OSMO))
def test_refused_on_submission(workflow: str, assignment: str):
    """What --set can say wrongly and OSMO itself notices: no task starts."""
    with pytest.raises((SpecError, TypeError, ValueError)):
        check(submit(OSMO / workflow, assignment), "6.3.1")


def test_ddp_has_four_nodes_by_default():
    assert len(tasks(submit(OSMO / "osmo-workflow-ddp.yaml"))) == 4


def test_sweep_has_the_six_arms():
    spec = submit(OSMO / "osmo-workflow-sweep.yaml")
    arms = {}
    for task in training_tasks(spec):
        settings = dict(o.split("=", 1) for o in overrides(task))
        arms[task["outputs"][0]["dataset"]["name"]] = (settings["training.lr"], settings["training.kl_weight"])
        assert settings["wandb.enabled"] == "false" and "credentials" not in task
    grid = {("1e5", "10"): "1e-5", ("5e5", "10"): "5e-5", ("1e4", "10"): "1e-4",
            ("1e5", "1"): "1e-5", ("5e5", "1"): "5e-5", ("1e4", "1"): "1e-4"}  # fmt: skip
    assert arms == {f"ur10e-act-sweep-lr{lr}-kl{kl}": (value, kl) for (lr, kl), value in grid.items()}


def test_the_default_sweep_is_the_documents_grid():
    """As the one parser of grids makes it, from the text in the comment beside it."""
    text = (OSMO / "osmo-workflow-sweep.yaml").read_text()
    assert f"sweep: >-  # python -m training.grid {EXAMPLE}\n" in text
    assert sections(text)[1]["sweep"].split() == [str(arm) for arm in parse_grid(EXAMPLE)]


def test_sweep_with_wandb_and_another_grid():
    """Any settings, with what --set makes of a command's lines: runs of their own names, tasks and datasets."""
    arms = parse_grid("training.lr=3e-5 conventions.image_resize=[240,320],null training.batch_size=8")
    spec = submit(OSMO / "osmo-workflow-sweep.yaml", "wandb=true", "sweep=" + "\n".join(map(str, arms)))
    check(spec, "6.3.1")
    assert len(training_tasks(spec)) == len(arms) == 2
    for task, arm in zip(training_tasks(spec), arms, strict=True):
        assert task["name"] == f"train-{arm.name}" and "lr3e5-image_resize" in arm.name
        assert task["outputs"] == [{"dataset": {"name": f"ur10e-act-sweep-{arm.name}"}}]
        assert tuple(overrides(task)[:3]) == arm.settings
        train.load_config(OSMO / "osmo-config.yaml", overrides(task))
        settings = dict(o.split("=", 1) for o in overrides(task))
        assert settings["wandb.enabled"] == "true" and settings["wandb.tags"] == "[sweep]"
        assert settings["wandb.run_name"] == f"sweep-{arm.name}" and "wandb.project" not in settings
        assert task["credentials"] == {"wandb": {"WANDB_API_KEY": "wandb_api_key"}}


@pytest.mark.parametrize("storage", [(), (STORAGE,)], ids=["datasets", "storage_url"])
@pytest.mark.parametrize("dataset", ["", "ur10e-eval-dataset"], ids=["held out", "LeRobot"])
def test_the_last_task_of_a_sweep_compares_its_arms(dataset: str, storage: tuple[str, ...]):
    """All of them, in the order of its inputs, on the same data; each arm knows what differs between them."""
    path = OSMO / "osmo-workflow-sweep.yaml"
    settings = [f"eval_dataset={dataset}", "eval_args=--rollout --max-mae=0.002", *storage]
    spec = submit(path, *settings)
    check(spec, "6.3.1")
    *arms, comparison = place(spec).values()
    assert comparison["name"] == "compare-arms" and comparison["image"].startswith("ur10e-act-eval")
    assert [i.get("task") for i in comparison["inputs"]] == [None, *(arm["name"] for arm in arms)]
    names = [word.removeprefix("--arm=") for word in comparison["args"] if word.startswith("--arm=")]
    assert [f"train-{name}" for name in names] == [arm["name"] for arm in arms]
    assert (dataset or "ur10e-rosbags") in str(comparison["inputs"][0])
    assert f"--{'dataset' if dataset else 'bags'}=/osmo/data/input/0" in comparison["args"]
    assert comparison["args"][-2:] == ["--rollout", "--max-mae=0.002"]
    assert "ur10e-act-sweep-comparison" in str(comparison["outputs"])
    for arm in arms:
        differs = ";".join(overrides(arm)[:2])
        data = f"--eval-dataset=/osmo/data/input/{2 if storage else 1}" if dataset else f"--eval-held-out={differs}"
        assert {data, "--eval-option=--max-mae=0.002"} <= set(arm["args"])
        assert ("meta/(info|stats)" in str(arm["inputs"])) is bool(dataset)
        assert arm["environment"] == comparison["environment"]


def test_a_sweep_need_not_be_compared():
    """Then its arms are what they are without; a word that is neither true nor false is refused."""
    path = OSMO / "osmo-workflow-sweep.yaml"
    alone = submit(path, "compare=false")
    check(alone, "6.3.1")
    assert tasks(alone) == training_tasks(alone) and len(tasks(alone)) == 6
    assert "--eval-" not in str([task["args"] for task in tasks(alone)])
    with pytest.raises(SpecError, match="no"):
        submit(path, "compare=no")


def test_wandb_gets_its_key_and_is_on():
    task = place(submit(OSMO / "osmo-workflow-wandb.yaml"), workflow_id="ur10e-act-wandb-3")["train-act"]
    assert task["credentials"] == {"wandb": {"WANDB_API_KEY": "wandb_api_key"}}
    assert {"wandb.enabled=true", "wandb.run_name=ur10e-act-wandb-3", "wandb.tags=[osmo]"} <= set(overrides(task))


def test_the_wandb_workflow_takes_mlflow_instead():
    """Its server and run name, the password from a credential, and nothing of wandb."""
    spec = submit(OSMO / "osmo-workflow-wandb.yaml", "mlflow_uri=https://mlflow.example.com", "mlflow_credential=ml")
    check(spec, "6.3.1")
    task = place(spec, workflow_id="ur10e-act-wandb-3")["train-act"]
    secrets = {"MLFLOW_TRACKING_USERNAME": "mlflow_username", "MLFLOW_TRACKING_PASSWORD": "mlflow_password"}
    assert task["credentials"] == {"ml": secrets}
    assert set(overrides(task)) == {
        "mlflow.enabled=true", "mlflow.run_name=ur10e-act-wandb-3", "mlflow.tracking_uri=https://mlflow.example.com",
    }  # fmt: skip
    open_server = submit(OSMO / "osmo-workflow-wandb.yaml", "mlflow_uri=http://mlflow:5000")
    assert "credentials" not in place(open_server)["train-act"]


def test_blob_has_a_sas_or_an_identity():
    task = tasks(submit(OSMO / "osmo-workflow-blob.yaml"))[0]
    assert "--download=/workspace/download-blob.sh" in task["args"] and "inputs" not in task
    assert task["credentials"] == {
        "azure-blob": {"AZURE_STORAGE_ACCOUNT": "azure_storage_account", "AZURE_STORAGE_SAS": "azure_storage_sas"}
    }
    assert task["environment"] == {
        "AZURE_BLOB_CONTAINER": "datasets", "AZURE_BLOB_PREFIX": "houston_recordings/",
        "BLOB_DEST_DIR": "/data/rosbags", "BLOB_TIMEOUT_S": "21600",
    }  # fmt: skip
    identity = submit(OSMO / "osmo-workflow-blob.yaml", "blob_credential=", "storage_account=acc")
    check(identity, "6.3.1")
    (task,) = tasks(identity)
    assert "credentials" not in task and task["environment"]["AZURE_STORAGE_ACCOUNT"] == "acc"


@pytest.mark.parametrize("storage", [(), (STORAGE,)], ids=["datasets", "storage_url"])
@pytest.mark.parametrize("dataset", ["", "ur10e-eval-dataset"], ids=["held out", "LeRobot"])
def test_train_eval_is_a_chain(dataset: str, storage: tuple[str, ...]):
    """What is evaluated are the recordings, unless there is a dataset; the training task checks what there is."""
    settings = ["eval_args=--rollout --max-mae=0.002", f"eval_dataset={dataset}", *storage]
    spec = submit(OSMO / "osmo-workflow-train-eval.yaml", *settings)
    check(spec, "6.3.1")
    training, evaluation = place(spec)["train-act"], place(spec)["eval-act"]
    assert evaluation["inputs"][0] == {"task": "train-act"}
    assert evaluation["environment"] == {"EVAL_EPISODES": "0 1 2 3" if dataset else "", "EVAL_DEVICE": "cuda"}
    assert evaluation["args"][-2:] == ["--rollout", "--max-mae=0.002"]
    assert (dataset or "ur10e-rosbags") in str(evaluation["inputs"][1])
    assert f"--{'dataset' if dataset else 'bags'}=/osmo/data/input/1" in evaluation["args"]
    assert ("--eval-held-out=" in training["args"]) is not any("--eval-dataset=" in word for word in training["args"])
    assert ("meta/(info|stats)" in str(training["inputs"])) is bool(dataset)
    assert "ur10e-eval-results" in str(evaluation["outputs"]) and evaluation["image"].startswith("ur10e-act-eval")
    chosen = place(submit(OSMO / "osmo-workflow-train-eval.yaml", *settings, "eval_episodes=0"))["eval-act"]
    assert chosen["environment"]["EVAL_EPISODES"] == "0", "a number that counts as nothing"


@each_workflow
def test_no_secret_is_written_or_echoed(path: Path):
    """Credentials come by name and key; no script traces its commands."""
    for task in tasks(submit(path, "wandb=true")):
        values = [v for c in task.get("credentials", {}).values() for v in c.values()]
        assert all(re.fullmatch(r"[a-z_]+", value) for value in values)
        assert not set(task.get("environment", {})) & {"WANDB_API_KEY", "AZURE_STORAGE_SAS"}
    for script in OSMO.glob("*.sh"):
        assert not re.search(r"set -\w*x|xtrace|printenv|declare -p", script.read_text()), script.name


# -- images -------------------------------------------------------------------------------------------------------


def test_the_evaluation_image_holds_all_that_the_evaluator_imports():
    """COPY brings every module of ours that it imports, and .dockerignore lets them through."""
    package = ROOT / "deploy" / "ur10e_deploy"
    wanted = imported_modules(*package.glob("*.py"), OSMO / "eval-entrypoint.sh")
    copied = [line.split()[1:-1] for line in (OSMO / "Dockerfile.eval").read_text().splitlines() if line[:4] == "COPY"]
    sources = {ROOT / name for words in copied for name in words}
    missing = {module for module in wanted if not {module, *module.parents} & sources}
    assert not missing
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*", "all that is not named below stays out of the build context"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    assert {str(source.relative_to(ROOT)) for source in sources} <= allowed


def test_the_images_are_pinned():
    for name in ("Dockerfile", "Dockerfile.eval"):
        text = (OSMO / name).read_text()
        assert re.search(r"^ARG BASE_IMAGE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", text, re.MULTILINE), name
        assert "USER 10001:10001" in text and "pip install" not in text
    assert "pip install --no-cache-dir" in (OSMO / "install-requirements.sh").read_text()
    assert re.search(r"^ARG AZCOPY_SHA256=[0-9a-f]{64}$", (OSMO / "Dockerfile").read_text(), re.MULTILINE)
    assert all(script.stat().st_mode & 0o111 for script in OSMO.glob("*.sh")), "entrypoints are executable"


# -- README -------------------------------------------------------------------------------------------------------


def test_the_readme_makes_folders_before_it_downloads_to_them():
    """OSMO's CLI refuses a destination that is not there."""
    for guide in GUIDES:
        made: set[str] = set()
        for words in readme_commands(guide):
            if words[:2] == ["mkdir", "-p"]:
                made |= set(words[2:])
            if words[:1] == ["osmo"] and words[2] == "download":
                assert words[-1].removeprefix("./") in made, words


def test_the_readme_uses_the_cli_as_documented():
    """Subcommands and options exist; what submits a workflow is accepted with its --set, by OSMO and by the trainer."""
    used = set()
    for words in osmo_commands():
        name, positional, options = parse_cli(words)
        used.add(name)
        if name in ("workflow submit", "workflow validate"):
            path = ROOT / positional[0]
            assert path in WORKFLOWS and len(positional) == 1, words
            given = options.get("--set", []) + options.get("--set-string", [])
            known = sections(path.read_text())[1]
            assert {g.split("=", 1)[0] for g in given} <= set(known), words
            spec = submit(path, *options.get("--set", []), strings=tuple(options.get("--set-string", [])))
            check(spec, "6.3.1")
            for task in place(spec).values():
                train.load_config(config_of(path), overrides(task))
        if name == "credential set":
            keys = {p.split("=", 1)[0] for p in options["--payload"]}
            wanted = {"wandb": {"wandb_api_key"}, "azure-blob": {"azure_storage_account", "azure_storage_sas"}}
            assert keys == wanted.get(positional[0], keys), words
        if name in ("dataset upload", "dataset download"):
            known_datasets = "ur10e-rosbags|ur10e-act-checkpoint|ur10e-eval-dataset|ur10e-eval-results|ur10e-act-sweep"
            assert re.match(known_datasets, positional[0]) and len(positional) == 2, words
    assert {"workflow submit", "credential set", "workflow logs", "dataset download", "data download"} <= used


def test_the_readme_suggests_what_trainer_and_evaluator_know():
    """In its text and tables, too: each `overrides=` there loads, each `eval_args=` parses."""
    settings, options = inline_settings("overrides"), inline_settings("eval_args")
    assert settings and options
    for each in settings:
        train.load_config(OSMO / "osmo-config.yaml", each.split())
    for each in options:
        offline_eval.parser().parse_args(["--checkpoint=C", "--dataset=D", *each.split()])


def test_the_readme_shows_the_logs_of_tasks_that_there_are():
    """`--task` names a task of the workflow that the id, NAME-1, is of."""
    shown = [words for words in readme_commands(GUIDE) if words[1:3] == ["workflow", "logs"]]
    names = {}
    for path in WORKFLOWS:
        spec = submit(path)
        names[spec["workflow"]["name"]] = {task["name"] for task in tasks(spec)}
    for words in shown:
        assert words[words.index("--task") + 1] in names[words[3].rpartition("-")[0]], words
    assert any("train-act-ddp" in words for words in shown)


def test_the_readme_names_every_variant_and_setting():
    text = GUIDE.read_text()
    submitted = {w[3] for w in readme_commands(GUIDE) if w[:3] == ["osmo", "workflow", "submit"]}
    assert submitted == {f"osmo/{path.name}" for path in WORKFLOWS}
    for name in set.union(*(set(sections(path.read_text())[1]) for path in WORKFLOWS)):
        assert f"`{name}`" in text, f"{name} is not in the README"
    for words in readme_commands():
        if words[:2] == ["docker", "build"]:
            assert (ROOT / words[words.index("-f") + 1]).is_file() and words[-1] == "."


def test_the_check_against_real_osmo_leaves_its_processes_light():
    """OSMO renders in a spawned process, which starts from the script's file, and has little memory for numpy."""
    code = "import runpy, sys; runpy.run_path('tests/real_osmo.py', run_name='__mp_main__'); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "'yaml'" in done.stdout and "'numpy'" not in done.stdout, done.stderr
