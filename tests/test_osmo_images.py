"""Both Dockerfiles built with buildah, and the images run as OSMO runs them. The slowest of the tests: leave
them out with `make test TESTS="tests --ignore=tests/test_osmo_images.py"`.

No NGC image can be fetched in CI: a minimal Debian stands in for it. As in NGC's, torch and torchvision are already
there, and here as a read-only mount from .venv (hard links, no bytes copied), so that a build that tried to replace
them would fail. Storage is a folder of the test run's own, removed at its end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lerobot_checkpoint import list_checkpoints, verify_checkpoint
from tests.osmo_spec import place, submit
from tests.osmo_task import WORKFLOWS, TaskBox, require, tiny, write_evaluation_dataset
from tests.tiny import ROOT

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("images")]  # one worker builds them
BASE = "localhost/base:ci"
TORCH = "/opt/torch"  # where the stand-in has its torch
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
DEBIAN_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")


def sh(*words: str | Path, timeout_s: int = 600, **options) -> str:
    """Run a program that has to succeed; -> what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    done = subprocess.run(
        list(map(str, words)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout_s, **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-4000:]}"
    return done.stdout


def with_requirements(*names: str) -> dict[str, Distribution]:
    """These installed distributions and all that they need here, by name."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = distribution(name)
        for line in found[name].requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                waiting.append(wanted.name)
                # torch names CUDA's parts as extras of one package
                for extra in wanted.extras:
                    waiting += [
                        Requirement(each).name
                        for each in distribution(wanted.name).requires or ()
                        if Requirement(each).marker is None or Requirement(each).marker.evaluate({"extra": extra})
                    ]
    return found


def link_torch(target: Path) -> None:
    """.venv's torch and torchvision with all that they need, under `target`, as hard links."""
    site = Path(sysconfig.get_paths()["purelib"])
    for package in with_requirements("torch", "torchvision").values():
        for file in package.files or ():
            source = Path(file.locate())
            if ".." in file.parts or not source.is_file() or file.suffix == ".pyc":
                continue  # scripts in bin/
            link = target / source.relative_to(site)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, link)


class Store:
    """buildah and podman with storage of their own."""

    def __init__(self, folder: Path, torch: Path) -> None:
        self.folder, self.torch = folder, torch
        # Podman refuses a runroot of more than 50 characters, and a checkout may lie deep.
        self.runroot = Path(tempfile.mkdtemp(prefix="images-", dir="/tmp"))
        self._options = ["--root", folder / "root", "--runroot", self.runroot, "--storage-driver", "overlay"]

    def buildah(self, *words: str | Path, timeout_s: int = 600) -> str:
        return sh("buildah", *self._options, *words, timeout_s=timeout_s)

    def build(self, dockerfile: str, image: str) -> str:
        """As the README says, on the stand-in; a layer per instruction, as Docker makes them."""
        volumes = ["-v", f"{self.torch}:{TORCH}:ro", "-v", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        return self.buildah(
            "bud", "--layers", "--format", "docker", "--isolation", "chroot", "--network", "host", "--pull-never",
            *volumes, "--build-arg", f"BASE_IMAGE={BASE}", "-t", image, "-f", WORKFLOWS / dockerfile, ROOT,
        )  # fmt: skip

    def inspect(self, image: str) -> dict[str, Any]:
        """What podman tells of an image: its environment, its history, where its layers lie."""
        return json.loads(sh("podman", *self._options, "image", "inspect", image))[0]

    def layers(self, image: str) -> set[Path]:
        """A folder for each layer, with the files that it adds."""
        data = self.inspect(image)["GraphDriver"]["Data"]
        return {Path(folder) for folder in [data["UpperDir"], *data.get("LowerDir", "").split(":")] if folder}

    def run(
        self, image: str, command: list[str] | None, mounts: dict[Path, str], **environment: str
    ) -> tuple[int, str]:
        """A container without a network, its command as OSMO gives it, or the image's own; -> (exit code, output)."""
        options = ["--rm", "--network", "none", "--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]
        for source, target in {self.torch: f"{TORCH}:ro", **mounts}.items():
            options += ["-v", f"{source}:{target}"]
        for name, value in environment.items():
            options += ["-e", f"{name}={value}"]
        if command:
            options += ["--entrypoint", command[0]]
        words = ["podman", *self._options, "--runtime", "runc", "run", *options, image, *(command or [])[1:]]
        done = subprocess.run(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """With the stand-in for NVIDIA's base image in it."""
    require("buildah", "podman", "runc", "mmdebstrap")
    (ROOT / "outputs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="images-", dir=ROOT / "outputs"))  # beside .venv: hard links need one disk
    made = Store(folder, folder / "torch")
    try:
        link_torch(made.torch)
        tree = folder / "debian"
        # with a compiler, as NVIDIA's has: one of LeRobot's dependencies comes as source only
        include = "--include=python3,python3-dev,python3-venv,python3-pip,ca-certificates,gcc,libc6-dev"
        sources = [DEBIAN_SOURCES] if DEBIAN_SOURCES.exists() else []
        options = ["--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io", include]
        sh("mmdebstrap", *options, "bookworm", tree, *sources)
        shutil.copy(CERTIFICATES, tree / CERTIFICATES[1:])
        (tree / "usr/lib/python3/dist-packages/torch.pth").write_text(TORCH + "\n")
        (tree / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        (tree / "usr/local/bin/torchrun").write_text('#!/bin/sh\nexec python3 -m torch.distributed.run "$@"\n')
        (tree / "usr/local/bin/torchrun").chmod(0o755)
        (tree / "etc/pip").mkdir()
        (tree / "etc/pip/constraint.txt").write_text("pyyaml==6.0.1\n")  # as NVIDIA's; not the newest there is
        own_opencv = (
            tree / "usr/local/lib/python3.11/dist-packages/cv2"
        )  # as NVIDIA's; one beside the other breaks both
        own_opencv.mkdir(parents=True)
        (own_opencv / "__init__.py").write_text("from cv2.own import nothing\n")
        (own_opencv / "own.py").write_text("nothing = None\n")
        container = made.buildah("from", "scratch").strip().splitlines()[-1]
        made.buildah("add", "--quiet", container, tree, "/")
        shutil.rmtree(tree)
        # Debian's pip installs nothing into the system's Python unless asked; NGC's is open.
        for variable in (
            "PIP_BREAK_SYSTEM_PACKAGES=1", "PIP_CONSTRAINT=/etc/pip/constraint.txt", f"SSL_CERT_FILE={CERTIFICATES}"
        ):  # fmt: skip
            made.buildah("config", "--env", variable, container)
        made.buildah("commit", "--quiet", "--rm", container, BASE)
        yield made
    finally:
        subprocess.run(["umount", "--recursive", "--quiet", str(folder / "root/overlay")], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(made.runroot, ignore_errors=True)


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that containers share with each other, open to the images' users as OSMO's are."""
    folder = tmp_path_factory.mktemp("pods")
    for path in (folder, *folder.parents[:3]):
        path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def train_image(store: Store) -> str:
    """The training image; the build has to have verified azcopy and left torch alone."""
    printed = store.build("Dockerfile", "localhost/train:ci")
    assert "azure-tools-azcopy-linux-10.32.2.tgz: OK" in printed and "azcopy version 10." in printed
    assert "Uninstalling torch" not in printed and "not with all pins" not in printed
    return "localhost/train:ci"


@pytest.fixture(scope="module")
def evaluation_image(store: Store) -> str:
    """The evaluation image; the build has to have left torch alone."""
    printed = store.build("Dockerfile.eval", "localhost/eval:ci")
    assert "Uninstalling torch" not in printed and "not with all pins" not in printed
    return "localhost/eval:ci"


def packages(store: Store, image: str) -> dict[str, str]:
    """name -> version of all that pip finds in an image."""
    code, printed = store.run(
        image, ["python3", "-m", "pip", "list", "--format=json", "--disable-pip-version-check"], {}
    )
    assert code == 0, printed
    return {canonicalize_name(item["name"]): item["version"] for item in json.loads(printed.splitlines()[-1])}


def test_the_images_hold_what_was_tested_together(store: Store, train_image: str, evaluation_image: str):
    """Every package that the build installed has the version of constraints.txt, or the one that the base pins."""
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    python = {"python_version": "3.11", "python_full_version": "3.11.2"}  # the stand-in's
    pinned = {
        canonicalize_name(line.name): str(line.specifier).removeprefix("==")
        for line in lines
        if line.marker is None or line.marker.evaluate(python)
    } | {"pyyaml": "6.0.1"}
    before = packages(store, BASE)
    for image, some in (
        (train_image, {"rosbags", "opencv-python-headless", "wandb", "mlflow-skinny"}),
        (evaluation_image, {"lerobot", "pyarrow", "av"}),
    ):
        found = {name: v for name, v in packages(store, image).items() if before.get(name) != v}
        assert some <= set(found)
        assert {name: v for name, v in found.items() if pinned.get(name) != v} == {}, image


@pytest.fixture(scope="module")
def trained(store: Store, train_image: str, sample_bags: Path, pods: Path) -> Path:
    """What the base workflow's command leaves in {{output}} when it runs in the image."""
    task = place(submit(WORKFLOWS / "osmo-workflow.yaml", tiny(training__steps=2, training__save_freq=2)))["train-act"]
    box = TaskBox(pods / "train", task, {0: sample_bags})
    box.delivered.chmod(0o777)
    data = {box.folder / "osmo/data/input": "/osmo/data/input:ro", box.delivered: "/osmo/data/output"}
    files = {box.folder / f["path"][1:]: f"{f['path']}:ro" for f in task["files"]}
    code, printed = store.run(train_image, task["command"] + task["args"], {**data, **files})
    assert code == 0, printed
    assert "complete: 1 checkpoints handed over" in printed
    return box.delivered


def test_the_training_image_trains(trained: Path):
    """As a user without rights: what it wrote belongs to that user."""
    (checkpoint,) = list_checkpoints(trained / "train-rosbag-act")
    verify_checkpoint(checkpoint)
    assert checkpoint.stat().st_uid == 10001
    assert (trained / "train-rosbag-act/summary.png").exists(), "matplotlib is in the image"


def test_the_training_image_holds_what_the_workflows_need(store: Store, train_image: str, pods: Path):
    """Not root, no code of ours, azcopy and torchrun there, no foreign torch; what the base image's constraint file
    pins is at that version."""
    script = (
        "id -u; ls -A /workspace; azcopy --version; torchrun --help | head -1; python -c 'import torch, wandb;"
        " print(torch.__file__)'; pip list 2>/dev/null; ls /usr/local/lib/python3.11/dist-packages/cv2"
    )
    code, printed = store.run(train_image, ["bash", "-c", script], {})
    assert code == 0, printed
    lines = printed.splitlines()
    assert lines[0] == "10001" and lines[1].startswith("azcopy version"), printed
    assert f"{TORCH}/torch/__init__.py" in lines
    assert "lerobot" not in printed
    assert "own.py" not in lines, "the base image's OpenCV gave way"
    assert re.search(r"^PyYAML +6\.0\.1$", printed, re.MULTILINE), printed


def test_the_evaluation_image_evaluates(
    store: Store, evaluation_image: str, trained: Path, sample_bags: Path, pods: Path
):
    """The chain's second task in its image: through its entrypoint, by LeRobot 0.3.2, without a network or root."""
    (pods / "dataset").mkdir()
    dataset = write_evaluation_dataset(sample_bags, pods / "dataset", episodes=2, frames=12)
    output = pods / "results"
    output.mkdir()
    output.chmod(0o777)
    data = "eval_dataset=ur10e-eval-dataset"
    spec = submit(WORKFLOWS / "osmo-workflow-train-eval.yaml", data, "eval_device=cpu", "eval_args=--backend lerobot")
    task = place(spec)["eval-act"]
    uploaded = f"/osmo/data/input/1/ur10e-eval-dataset/{dataset.name}"  # as OSMO lays a dataset out
    mounts = {trained: "/osmo/data/input/0:ro", dataset: f"{uploaded}:ro", output: "/osmo/data/output"}
    code, printed = store.run(evaluation_image, task["command"] + task["args"], mounts, **task["environment"])
    assert code == 0, printed
    assert {"episode_000.parquet", "episode_001.parquet", "all_episodes.parquet"} <= {p.name for p in output.iterdir()}
    assert (output / "summary.json").stat().st_uid == 10001
    code, printed = store.run(evaluation_image, None, {})  # the image's own entrypoint, without arguments
    assert code == 1 and "error: eval-entrypoint: expected --checkpoint=DIR" in printed, printed


# Not /var/cache/apt: the settings of Debian's and Ubuntu's images empty it, those of our stand-in do not.
CACHES = ["root/.cache", "root/.npm", "home/*/.cache", "home/*/.npm", "var/lib/apt/lists", "tmp"]
# What a later instruction removes.
BUILD_FILES = {f"tmp/build/{name}" for name in ("pyproject.toml", "constraints.txt", "install-requirements.sh")}


def test_no_layer_keeps_a_cache(store: Store, train_image: str, evaluation_image: str):
    """Nor what a later instruction removes, which is pulled all the same. What is the base's is not looked at."""
    for image in (train_image, evaluation_image):
        files = {
            str(path.relative_to(layer))
            for layer in store.layers(image) - store.layers(BASE)
            for cache in CACHES
            for path in layer.glob(f"{cache}/**/*")
            if path.is_file()
        }
        assert files == BUILD_FILES, image


def test_no_image_knows_a_credential(store: Store, train_image: str, evaluation_image: str):
    """Neither its environment nor an instruction that made it names one, not even as a build argument."""
    for image in (train_image, evaluation_image):
        told = store.inspect(image)
        lines = [*told["Config"]["Env"], *(step["created_by"] for step in told["History"])]
        assert any("install-requirements.sh" in line for line in lines), "the history is there"
        assert not [line for line in lines if re.search("KEY|SAS|TOKEN|SECRET|PASSWORD", line)], image
