"""python -m osmo.submit: what it submits, what it refuses before anything is uploaded, and that bags go up once."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from osmo import submit as tool
from rosbag_dataset import find_bags
from tests.bags import write_bag
from tests.checks import TAKE
from tests.osmo_cluster import calls, install
from tests.osmo_spec import check, parse_cli, place, readme_commands, submit, tasks
from tests.tiny import ROOT

STORAGE = "storage_url=azure://account/container/prefix"
FILE = """pool: gpu-pool
image: 192.168.1.100:5000/ur10e-act-train:1
eval_image: 192.168.1.100:5000/ur10e-act-eval:1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A submit.yaml without bags."""
    path = tmp_path / "submit.yaml"
    path.write_text(FILE)
    return path


def shown(printed: str) -> list[list[str]]:
    """The commands that were printed, as words."""
    return [shlex.split(line[2:]) for line in printed.splitlines() if line.startswith("$ ")]


def dry_run(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The command that would submit, as words."""
    assert tool.main([*words, "--dry-run", "--file", str(file)]) == 0, capsys.readouterr().err
    return shown(capsys.readouterr().out)[-1]


def spec_of(command: list[str]) -> dict:
    """What OSMO gets from a command."""
    _, (workflow,), options = parse_cli(command)
    return submit(Path(workflow), *options.get("--set", []), strings=tuple(options.get("--set-string", [])))


# -- what is submitted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [[], [STORAGE]], ids=["datasets", "storage_url"])
@pytest.mark.parametrize("name", tool.NAMES)
def test_each_workflow_is_submitted_as_documented(
    name: str, storage: list[str], file: Path, capsys: pytest.CaptureFixture[str]
):
    """One `osmo workflow submit` that OSMO accepts, in which words and file arrive; what was checked is what it is."""
    words = [name, *storage, "steps=20", "memory=64Gi", "training.batch_size=8", "conventions.image_resize=[240,320]"]
    command = dry_run(file, capsys, *words)
    spec = spec_of(command)
    check(spec, "6.3.1")
    assert command[:3] == ["osmo", "workflow", "submit"] and command[4:6] == ["--pool", "gpu-pool"]
    assert spec["workflow"]["resources"]["default"]["memory"] == "64Gi"
    wanted = {"--override=training.steps=20", "--override=training.batch_size=8"}
    wanted |= {"--override=conventions.image_resize=[240,320]"}
    training = [task for task in tasks(spec) if task["command"][-1].endswith("train-entrypoint.sh")]
    assert training and all(wanted <= set(task["args"]) for task in training)
    assert {task["image"] for task in tasks(spec)} <= {line.split()[1] for line in FILE.splitlines()[1:]}
    checked = tool.rendered(tool.read_submission(name, words[1:], file))
    fields = ("name", "image", "command", "args", "inputs", "outputs", "environment")
    assert [[task.get(f) for f in fields] for task in checked] == [[t.get(f) for f in fields] for t in tasks(spec)]


def test_every_workflow_has_a_short_name():
    assert {tool.workflow_file(name) for name in tool.NAMES} == set((ROOT / "osmo").glob("osmo-workflow*.yaml"))


def test_the_guides_submit_what_there_is(capsys: pytest.CaptureFixture[str]):
    """Each `python -m osmo.submit` in them, with the example as submit.yaml; the bags are not here."""
    commands = [words for words in readme_commands() if words[:3] == ["python", "-m", "osmo.submit"]]
    assert len(commands) > 3
    for words in commands:
        given = [*(word for word in words[3:] if word != "--dry-run"), "bags="]
        check(spec_of(dry_run(ROOT / "osmo/submit.example.yaml", capsys, *given)), "6.3.1")


def test_a_word_wins_over_the_file(file: Path, capsys: pytest.CaptureFixture[str]):
    """Settings too; what only other workflows have is no mistake in the file; lists are written as in YAML."""
    lines = "priority: LOW\nmemory: 8Gi\ntraining.lr: 1e-4\nconventions.image_resize: [240, 320]\nn_nodes: 2\n"
    file.write_text(FILE + lines)
    command = dry_run(file, capsys, "base", "memory=9Gi", "training.lr=3e-5", "pool=mine")
    task = place(spec_of(command))["train-act"]
    assert (
        "--override=training.lr=3e-5" in task["args"]
        and "--override=conventions.image_resize=[240,320]" in task["args"]
    )
    assert "memory=9Gi" in command and "memory=8Gi" not in command and "n_nodes=2" not in command
    assert command[command.index("--pool") + 1] == "mine" and command[command.index("--priority") + 1] == "LOW"


def test_values_arrive_as_they_are_typed(file: Path, capsys: pytest.CaptureFixture[str]):
    """--set makes 1.1 of 1.10, and a number of a run's name: such go behind --set-string."""
    command = dry_run(file, capsys, "base", STORAGE, "platform=1.10", "gpu=1")
    assert command[-2:] == ["--set-string", "platform=1.10"] and "gpu=1" in command
    assert spec_of(command)["workflow"]["resources"]["default"]["platform"] == "1.10"


def test_a_grid_is_given_as_such(file: Path, capsys: pytest.CaptureFixture[str]):
    """`sweep` takes what python -m training.grid takes."""
    spec = spec_of(dry_run(file, capsys, "sweep", "sweep=training.lr=2e-5,4e-5 training.batch_size=4,8"))
    names = [task["name"] for task in tasks(spec) if task["name"].startswith("train-")]
    assert names == [f"train-lr{lr}-batch_size{size}" for size in (4, 8) for lr in ("2e5", "4e5")]


def test_the_example_can_be_copied(capsys: pytest.CaptureFixture[str]):
    """Each key in it, also those behind #, is one that there is; git ignores the copy."""
    example = ROOT / "osmo/submit.example.yaml"
    submission = tool.read_submission("base", [], example)
    assert submission.pool and submission.bags and ":" in submission.value("image")
    text = example.read_text().replace("# storage_url", "storage_url").replace("azure://ACCOUNT", "azure://account")
    text = "\n".join(line.removeprefix("# ") if line.startswith("# ") and ": " in line[:40] else line
                     for line in text.splitlines()[1:])  # fmt: skip
    assert "\nmemory: 64Gi" in text and "\ndata.camera_topic: " in text
    ignored = subprocess.run(["git", "check-ignore", "osmo/submit.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout == "osmo/submit.yaml\n" or not (ROOT / ".git").exists()


# -- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {  # words, what is added to the file (or taken from it, behind -), the message
    "an unknown name": ("base stepz=5", "", "stepz=5: unknown key stepz; did you mean steps?"),
    "a setting without its section": ("base lr=5", "", "lr=5: unknown key lr; did you mean training.lr?"),
    "a name of another workflow": ("base n_nodes=2", "", "n_nodes=2: unknown key n_nodes"),
    "an unknown key of the file": ("base", "imagee: x", "submit.yaml: unknown key imagee; did you mean image?"),
    "no key=value": ("base steps", "", "steps: expected key=value, for example steps=20000"),
    "a word twice": ("base steps=5 steps=6", "", "steps=6: steps is given twice"),
    "a key of the file twice": ("base", "pool: x", "not valid YAML at line 4, column 1: key 'pool' given twice"),
    "overrides as text": ("base overrides=training.lr=1", "", "overrides: give the settings themselves, for example"),
    "a setting that does not exist": ("base training.stepz=5", "", "unknown key training.stepz; did you mean training"),
    "a value of another kind": ("base steps=1e4", "", "training.steps: found '1e4', expected a whole number"),
    "a rule between settings": ("base model.n_action_steps=200", "", "model.n_action_steps"),
    "a fixed setting": ("base training.output_dir=/x", "", "train-entrypoint: overrides: training.output_dir=/x: this"),
    "a space": ("base training.device='a b'", "", "training.device: found ' ' in a b, expected a value without spaces"),
    "a setting twice": ("base steps=5 training.steps=6", "", "training.steps is given twice"),
    "what a sweep varies": ("sweep training.lr=1e-3", "", "training.lr is given twice"),
    "a grid of nothing": ("sweep sweep=lr1:training.lr=1", "", "grid: found lr1:training.lr=1, expected section.key="),
    "a bad value in a grid": ("sweep sweep=training.lr=1e-5,fast", "", "training.lr: found 'fast', expected a number"),
    "no pool": ("base pool=", "", "pool: found nothing, expected the pool's name; `osmo pool list` shows yours"),
    "a priority": ("base priority=low", "", "priority: found low, expected one of HIGH, NORMAL, LOW"),
    "an image without registry": ("base image=ur10e-act-train:1", "", "image: found ur10e-act-train:1, expected"),
    "an image of nobody": ("base image=me/ur10e:1", "", "image: found me/ur10e:1, expected it with its registry"),
    "the latest image": ("base image=r.io/a:latest", "", "image: found r.io/a:latest, expected a tag of its own"),
    "an image without tag": ("train-eval eval_image=r.io:50/a", "", "eval_image: found r.io:50/a, expected a tag"),
    "a url with a slash": (f"base {STORAGE}/", "", "storage_url: found 'azure://account/container/prefix/', expected"),
    "a run without a url": ("base run=mine", "", "run: found 'mine', but no storage_url"),
    "four GPUs": ("base gpu=4", "", "gpu: found '4', expected 1"),
    "half a node": ("ddp n_nodes=1.5", "", "osmo-workflow-ddp.yaml: cannot be rendered with these values: "),
    "wandb without its workflow": ("base wandb.enabled=true", "", "wandb.enabled: true, but there is no key"),
    "an evaluation's option": ("train-eval eval_args=--roll", "", "eval-entrypoint: eval_args: found --roll, expected"),
    "an evaluation's device": ("train-eval eval_device=mps", "", "eval-entrypoint: EVAL_DEVICE: found 'mps', expected"),
    "no such folder": ("base bags=/no/where", "", "data.bag_dir: /no/where: expected a folder of ROS 2 bags, found no"),
    "another workflow": ("all", "", "argument workflow: invalid choice: 'all' (choose from"),
}  # fmt: skip


@pytest.mark.parametrize("words, added, message", REFUSED.values(), ids=list(REFUSED))
def test_refused_in_one_line(words: str, added: str, message: str, file: Path, capsys: pytest.CaptureFixture[str]):
    """Before OSMO is asked for anything."""
    file.write_text(f"{FILE}{added}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "_run", lambda *_, **__: pytest.fail("osmo was called"))
        try:
            code = tool.main([*shlex.split(words), "--file", str(file)])
        except SystemExit as end:
            code = end.code
    printed = capsys.readouterr()
    assert code == 1 and printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert message in printed.err


def test_without_a_file_it_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert tool.main(["base", "--file", str(tmp_path / "submit.yaml")]) == 1
    assert "submit.yaml: No such file or directory; copy " in (line := capsys.readouterr().err)
    assert "osmo/submit.example.yaml there, and edit it" in line


def test_bags_that_training_would_refuse_are_not_uploaded(
    bag_dir: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """By the settings of this submission: a camera that was not recorded, nothing held out for an evaluation, a bag cut
    short; or a folder that is a link."""
    environment = install(tmp_path / "cluster", tasks=False)
    monkeypatch.setenv("PATH", environment["PATH"])
    monkeypatch.setenv("CLUSTER", environment["CLUSTER"])
    given = ["base", f"bags={bag_dir}", "--file", str(file)]
    assert tool.main([*given, "data.camera_topic=/front"]) == 1
    assert "/front" in capsys.readouterr().err
    assert tool.main(["train-eval", *given[1:]]) == 1
    assert "found 2 recordings, of which the training holds 0 out, expected at least 5" in capsys.readouterr().err
    (bag_dir / "c").symlink_to(bag_dir / "a")
    assert tool.main(given) == 1
    assert f"{bag_dir}/c is a link to a folder, which OSMO leaves out" in capsys.readouterr().err
    (bag_dir / "c").unlink()
    (damaged,) = bag_dir.glob("b/*.mcap")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert tool.main(given) == 1
    assert capsys.readouterr().err.startswith("error: b: ")
    assert calls(tmp_path / "cluster") == []


# -- the bags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [[], [STORAGE]], ids=["datasets", "storage_url"])
def test_bags_are_uploaded_once(
    storage: list[str], bag_dir: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """A second submission finds them, from another folder, too; with one byte changed, they go up as others; what was
    left half-way is completed. Each is the recordings of its own workflow."""
    cluster = tmp_path / "cluster"
    for name, value in install(cluster, tasks=False).items():
        monkeypatch.setenv(name, value)

    def submitted(folder: Path) -> tuple[list[str], str]:
        """(the kinds of commands that were called, what the workflow reads)."""
        before = len(calls(cluster))
        assert tool.main(["base", *storage, f"bags={folder}", "--file", str(file)]) == 0, capsys.readouterr().err
        assert re.search(r"then:\n\$ osmo workflow logs ur10e-act-train-\d --task train-act\n", capsys.readouterr().out)
        called = calls(cluster)[before:]
        source = place(spec_of(["osmo", *called[-1]]))["train-act"]["inputs"][0]
        return [words[1] for words in called], str(source)

    ask = "list" if storage else "info"
    whole = [ask, "validate", "upload", ask, "submit"]
    kinds, first = submitted(bag_dir)
    assert kinds == whole and "ur10e-rosbags" in first and "bags-" in first
    shutil.copytree(bag_dir, tmp_path / "elsewhere/other")
    kinds, again = submitted(tmp_path / "elsewhere/other")
    assert kinds == [ask, "submit"] and again == first
    metadata = bag_dir / "a/metadata.yaml"
    metadata.write_text(metadata.read_text() + "#")
    kinds, other = submitted(bag_dir)
    assert kinds == whole and other != first
    if storage:
        (cut,) = [path for path in (cluster / "blobs").rglob("metadata.yaml") if path.read_text().endswith("#")]
        cut.unlink()
        assert submitted(bag_dir) == (whole, other) and cut.exists()


def test_the_name_of_bags_is_what_they_hold(bag_dir: Path, tmp_path: Path):
    """Not where they lie; every byte counts, and so does an episode's name."""
    tag = tool.content_tag(find_bags(bag_dir))
    assert tag.startswith("bags-") and len(tag) == 17
    copy = tmp_path / "copy"
    shutil.copytree(bag_dir, copy)
    (copy / "a/notes.txt").write_text("not a recording")
    assert tool.content_tag(find_bags(copy)) == tag
    (copy / "a").rename(copy / "aa")
    assert tool.content_tag(find_bags(copy)) != tag
    (copy / "aa").rename(copy / "a")
    (storage,) = copy.glob("b/*.mcap")
    content = bytearray(storage.read_bytes())
    content[len(content) // 2] ^= 1
    storage.write_bytes(content)
    assert tool.content_tag(find_bags(copy)) != tag


FAILURES = {
    "no osmo": ("", {"PATH": "/nowhere"}, "osmo: not installed here, or not in PATH"),
    "no connection": ("", {"BROKEN": "Cannot connect to OSMO service"}, "Cannot connect to OSMO service"),
    "no datasets": ("", {"BROKEN": "argument module: invalid choice: 'dataset'"}, "no datasets any more (6.4); give a"),
    "refused on submission": ("memory=64GB", {}, "osmo workflow validate: exit code 1; what it says is above"),
}


@pytest.mark.parametrize("word, environment, message", FAILURES.values(), ids=list(FAILURES))
def test_what_osmo_refuses_is_one_line_too(
    word: str, environment: dict[str, str], message: str, file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """And nothing is uploaded that could not be used."""
    write_bag(tmp_path / "bags/a", TAKE.messages())
    bash = shutil.which("bash")
    for name, value in (install(tmp_path / "cluster", tasks=False) | environment).items():
        monkeypatch.setenv(name, value)
    if environment.get("PATH"):
        (tmp_path / "bin").mkdir()
        for program in ("bash", "sed", "dirname", "cat"):
            (tmp_path / "bin" / program).symlink_to(shutil.which(program, path=os.path.dirname(bash)) or bash)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    words = [w for w in (word, f"bags={tmp_path / 'bags'}") if w]
    assert tool.main(["base", *words, "--file", str(file)]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert not any(words[1] in ("upload", "submit") for words in calls(tmp_path / "cluster"))
