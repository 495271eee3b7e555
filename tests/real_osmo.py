"""Every `osmo workflow submit` of the guides, run by OSMO's own command line against OSMO's own service.

    git clone --branch 6.3.1 https://github.com/NVIDIA/OSMO ../OSMO
    uv venv --python 3.13 ../osmo-venv
    uv pip install --python ../osmo-venv/bin/python -r ../OSMO/src/requirements.txt \
        rosbags opencv-python-headless tqdm
    ../osmo-venv/bin/python -m tests.real_osmo ../OSMO              # this checkout
    ../osmo-venv/bin/python -m tests.real_osmo ../OSMO CHECKOUT     # another checkout of this project

Both run in this process. The service's FastAPI application answers on a local port. `osmo` (its main function, its
argument parser, its requests) submits to it what the two guides and the workflows' heads say; of this checkout, some
variants more. OSMO renders, validates and takes each as on a cluster, within its default limits of time and memory.

Stood in for: the database (it answers with one pool of two platforms, one dataset bucket, and the credentials that the
guide sets), the job queue (it keeps what would be run), the login (OSMO's own `--method dev`), the upload of a
dataset's `localpath`. Switched off, by OSMO's own settings: looking up images and storage credentials over the network.
So nothing is checked of what the cluster would have to have: an image, free nodes, blobs.

What is accepted then has to be what our own model (osmo_spec.py) makes of it: spec, commands, files, one volume per
file. Prints a table; exit code 1 when a command is refused that the guide says works (6.4 has no datasets), or when
the model thinks otherwise. Not part of `make test`: it needs OSMO's source, and packages that do not go together with
ours. 6.3.1 and later need Python 3.12.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

if __name__ != "__mp_main__":  # OSMO's processes for templates start from this file, and have little memory
    from tests.osmo_spec import SpecError, check, osmo_commands, place, readme_commands, submit, tasks

STORAGE, S3 = "storage_url=azure://account/container/prefix", "storage_url=s3://bucket/prefix"
IMAGE = "image=192.168.1.100:5000/ur10e-act-train:1"
VARIANTS = {  # beside the guides' commands; each with datasets and with a storage url, the plain ones on S3, too
    "osmo-workflow.yaml": (
        [],
        ["recordings=ur10e-rosbags/bags-0123456789ab"],
        ["steps=10", "memory=64Gi", "platform=p", "overrides=training.lr=5e-5 conventions.image_resize=[240,320]"],
    ),
    "osmo-workflow-ddp.yaml": ([], ["n_nodes=1"], ["n_nodes=2"], ["n_nodes=8"]),
    "osmo-workflow-sweep.yaml": (
        [],
        ["wandb=true", "compare=false"],
        ["eval_dataset=ur10e-eval-dataset"],
        ["sweep=lr2e5:training.lr=2e-5 lr4e5:training.lr=4e-5"],
    ),
    "osmo-workflow-blob.yaml": ([], ["blob_credential=", "storage_account=account"]),
    "osmo-workflow-train-eval.yaml": (
        [],
        ["eval_dataset=ur10e-eval-dataset", "eval_args=--rollout --max-mae=0.002", "eval_episodes=0 1"],
    ),
    "osmo-workflow-wandb.yaml": ([], ["mlflow_uri=https://mlflow.example.com", "mlflow_credential=mlflow"]),
}
SUBMIT = [  # what osmo/submit.py calls beside `osmo workflow`
    ["osmo", "pool", "list"],
    ["osmo", "dataset", "info", "ur10e-rosbags:bags-0123456789ab", "--format-type", "json"],
    ["osmo", "dataset", "upload", "ur10e-rosbags:bags-0123456789ab", "../rosbag-to-lerobot/local_bags"],
    ["osmo", "data", "list", "azure://account/container/ur10e-rosbags/bags-0123456789ab/", "--recursive", "--no-pager"],
]
PLACEHOLDERS = {"POOL": "gpu-pool", "REGISTRY": "192.168.1.100:5000", "TAG": "1"}  # at the workflows' heads


# -- the service ----------------------------------------------------------------------------------------------------


class Row(dict):
    """A row of the database, by name or by attribute, as OSMO asks for it."""

    __getattr__ = dict.get


def database(credentials: dict[str, dict[str, str]]) -> Any:
    """Stands in for OSMO's database: one pool with the platforms `default` and `p`, OSMO's default settings."""
    from src.lib.utils import common
    from src.utils import connectors

    now = common.current_time()
    pool = {
        "name": "gpu-pool", "backend": "cluster", "default_platform": "default", "download_type": "download",
        "platforms": {"default": {}, "p": {}}, "last_heartbeat": now,
    }  # fmt: skip
    backend = {
        "name": "cluster", "description": "", "version": "", "k8s_uid": "uid", "k8s_namespace": "osmo", "tests": [],
        "dashboard_url": "", "grafana_url": "", "scheduler_settings": "{}", "node_conditions": {},
        "last_heartbeat": now, "created_date": now, "router_address": "",
    }  # fmt: skip
    rows = {"FROM pools": pool, "FROM backends": backend, "SELECT workflow_id FROM workflows": {"workflow_id": "w-1"}}
    registry = ["192.168.1.100", "192.168.1.100:5000"]  # before 6.4 the host alone
    unchecked = {"disable_registry_validation": registry, "disable_data_validation": ["azure", "s3"]}
    workflow = connectors.WorkflowConfig(credential_config=unchecked)
    buckets = {"bucket": {"dataset_path": "azure://account/datasets"}}

    class Database(connectors.PostgresConnector):
        def __init__(self) -> None:
            self.config = types.SimpleNamespace(method="dev")

        def execute_fetch_command(self, command: str, args: tuple, return_raw: bool = False) -> list[Row]:
            return [Row(row) for start, row in rows.items() if start in " ".join(command.split())]

        def execute_commit_command(self, *_: Any) -> None: ...
        def execute_commit_commands(self, *_: Any) -> None: ...
        def execute_autocommit_command(self, *_: Any) -> None: ...
        def mogrify(self, entries: list) -> str:
            return ""

        def get_service_configs(self) -> Any:
            return connectors.ServiceConfig()

        def get_workflow_configs(self) -> Any:
            return workflow

        def get_dataset_configs(self) -> Any:
            return connectors.DatasetConfig(buckets=buckets, default_bucket="bucket")

        def get_all_data_creds(self, user: str) -> dict:
            return {}

        def get_generic_cred(self, user: str, name: str) -> dict[str, str]:
            from src.lib.utils import osmo_errors

            if name not in credentials:
                raise osmo_errors.OSMOCredentialError(f"Could not find the credential {name}")
            return credentials[name]

        def get_workflow_service_url(self) -> str:
            return "http://localhost"

    return Database()


def start_service(credentials: dict[str, dict[str, str]], queue: list[Any], rendered: list[str]) -> str:
    """The service's own application; -> its address. `queue` gets the jobs, `rendered` every text it has rendered."""
    import uvicorn

    osmo = Path(sys.modules["src"].__path__[0])
    package = types.ModuleType("src.utils.metrics")  # its __init__.py is for OSMO's own build
    package.__path__ = [str(osmo / "utils/metrics")]
    sys.modules["src.utils.metrics"] = package
    from src.service.core import service
    from src.service.core.workflow import objects
    from src.utils import connectors
    from src.utils.job import jobs_base, workflow

    connected = database(credentials)
    connectors.PostgresConnector._instance = connected
    config = objects.WorkflowServiceConfig(postgres_password="", method="dev")  # noqa: S106 - of no database
    objects.WorkflowServiceContext.set(objects.WorkflowServiceContext(config=config, database=connected))
    jobs_base.Job.send_job_to_queue = lambda job: queue.append(job)
    load = workflow.TemplateSpec.load_template_with_variables

    def load_and_keep(self: Any) -> str:
        rendered.append(load(self))
        return rendered[-1]

    workflow.TemplateSpec.load_template_with_variables = load_and_keep
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app, log_config=None))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


# -- the command line -----------------------------------------------------------------------------------------------


def osmo(*words: str) -> tuple[int, str]:
    """`osmo WORDS`, as its own main function runs it; -> exit code, all that it printed."""
    from src.cli import cli

    printed, code, sys.argv = io.StringIO(), 0, ["osmo", *words]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            cli.main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        finally:
            logging.getLogger().handlers.clear()  # it adds its own each time
    return code, printed.getvalue()


def reason(printed: str) -> str:
    """The refusal on one line, without what pydantic 2 adds to each."""
    lines = [line.strip() for line in printed.splitlines() if "errors.pydantic.dev" not in line]
    return " ".join(" ".join(lines).split())


def submission(words: list[str]) -> tuple[Path, list[str], list[str]]:
    """The workflow, the --set and the --set-string values of an `osmo workflow submit`, by OSMO's own parser."""
    from src.cli.main_parser import create_cli_parser

    args = create_cli_parser().parse_args(words)
    return Path(args.workflow_file), args.set, args.set_string


# -- what is accepted -------------------------------------------------------------------------------------------------


def differences(ours: dict[str, Any], rendered: str, job: Any) -> Iterator[str]:
    """What the service took, against what our own model makes of the same command."""
    from src.utils.job import kb_objects

    if yaml.safe_load(rendered) != ours:
        yield "our own model renders it otherwise"
    placed, given = place(ours), {task["name"]: task for task in tasks(ours)}
    for group in job.spec.groups:
        hosts = {f"host:{task.name}": task.name for task in group.tasks}
        for task in group.tasks:
            parsed, mine = task.parse("workflow-1", hosts), placed[task.name]
            if [*parsed.command, *parsed.args] != mine["command"] + mine.get("args", []):
                yield f"our own model gives {task.name} another command"
            if [f.contents for f in parsed.files] != [f["contents"] for f in given[task.name].get("files", [])]:
                yield f"a token in a file of {task.name} is replaced"
            factory = kb_objects.K8sObjectFactory.__new__(kb_objects.K8sObjectFactory)  # of no cluster
            mounts = parsed.get_filemounts("0" * 32, factory)
            if any(len({get(m) for m in mounts}) < len(mounts) for get in (lambda m: m.name, lambda m: m.path)):
                yield f"two files of {task.name} are one volume, or in one place: Kubernetes refuses the pod"


def run(words: list[str], version: str, queue: list[Any], rendered: list[str]) -> tuple[str, bool]:
    """(accepted, or refused and why; whether that is a failure) of one submission."""
    queue.clear()
    rendered.clear()
    for _ in range(5):  # a machine that is busy with other things needs longer than OSMO allows by default
        code, printed = osmo(*words)
        if "exceeded time limit" not in printed:
            break
    path, assignments, strings = submission(words)
    try:
        ours = submit(path, *assignments, strings=tuple(strings))
        check(ours, version)
        refusal = ""
    except SpecError as error:
        refusal = str(error)
    if "Got an exception of type" in printed:  # no refusal: our stand-ins do not carry it
        return f"BROKEN: {reason(printed)[-600:]}", True
    if code:
        datasets_gone = version == "6.4" and not any(a.startswith("storage_url=") for a in assignments)
        agreed = "" if refusal else "; OUR MODEL ACCEPTS IT"
        return f"refused: {reason(printed)[:330]}{agreed}", not (datasets_gone and refusal)
    if refusal and words[1] == "submit":  # `validate` posts no original, and so does not see what `submit` refuses
        return f"accepted, BUT OUR MODEL REFUSES IT: {refusal}", True
    taken = [job for job in queue if hasattr(job, "group_and_task_uuids")]
    if words[1] == "validate" and "succeeded" in printed and not taken:
        return "accepted", False
    wrong = list(differences(ours, rendered[-1], *taken)) if len(taken) == 1 else ["nothing is in the job queue"]
    return "accepted" + "".join(f", BUT {each}" for each in wrong), bool(wrong)


def submissions(checkout: Path, variants_too: bool) -> Iterator[list[str]]:
    """What is submitted: the commands of the guides and of the workflows' heads, then the variants."""
    for words in osmo_commands(checkout):
        if words[1:3] in (["workflow", "submit"], ["workflow", "validate"]):
            yield [_filled(word) for word in words[1:]]
    for name, variants in VARIANTS.items() if variants_too else ():
        for variant in variants:
            for storage in ([], [STORAGE], *([] if variant else [[S3]])):
                images = [IMAGE, "eval_" + IMAGE] if "eval" in name or "sweep" in name else [IMAGE]
                variant = variant if storage else [word.replace("/bags-", ":bags-") for word in variant]
                yield ["workflow", "submit", f"osmo/{name}", "--pool", "gpu-pool", "--set", *images, *variant, *storage]


def _filled(word: str) -> str:
    for name, value in PLACEHOLDERS.items():
        word = value if word == name else word.replace(f"={name}/", f"={value}/").replace(f":{name}", f":{value}")
    return word


def not_understood(checkout: Path, without_datasets: bool) -> Iterator[str]:
    """The other `osmo` commands that OSMO's parser refuses; it looks whether folders exist."""
    from src.cli.main_parser import create_cli_parser

    for words in readme_commands(checkout / "README.md", checkout / "osmo/README.md"):
        if words[0] == "mkdir":
            os.makedirs(words[-1], exist_ok=True)
    for words in osmo_commands(checkout) + SUBMIT:
        if words[1] != "dataset" or not without_datasets:
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    create_cli_parser().parse_args(words[1:])
            except (SystemExit, Exception) as error:  # noqa: BLE001 - argparse exits; OSMO's checks raise theirs
                yield f"{shlex.join(words)}: {error!r}"


def main() -> int:
    arguments = sys.argv[1:]
    if len(arguments) not in (1, 2) or not Path(arguments[0], "src/cli/workflow.py").is_file():
        print("error: expected the folder of an OSMO checkout; see the head of this file", file=sys.stderr)
        return 2
    checkout = Path(arguments[1] if len(arguments) == 2 else Path(__file__).parent.parent).resolve()
    sys.path.insert(0, str(Path(arguments[0]).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OSMO_CONFIG_FILE_DIR"] = os.environ["OSMO_LOG_FILE_DIR"] = folder
        recording = Path(folder, "rosbag-to-lerobot/local_bags/day1/recording")  # beside the checkout
        recording.mkdir(parents=True)
        (recording / "recording_0.db3").touch()
        copy = Path(folder, "checkout")
        copy.mkdir()
        for path in checkout.iterdir():
            (copy / path.name).symlink_to(path)
        os.chdir(copy)
        try:
            return compare(copy, variants_too=len(arguments) == 1)
        finally:
            os.chdir("/")


def compare(checkout: Path, variants_too: bool) -> int:
    """Submit all of this checkout's commands, print the table; -> exit code."""
    import src.cli.workflow as cli
    from src.lib.data.storage import common as storage
    from src.lib.utils import jinja_sandbox
    from src.utils import connectors

    version = "6.3.1" if hasattr(connectors, "DatasetConfig") else "6.4"  # our model makes no difference before 6.4
    credentials = {
        words[3]: dict(pair.split("=", 1) for pair in words[words.index("--payload") + 1 :])
        for words in osmo_commands(checkout)
        if words[1:3] == ["credential", "set"]
    }
    queue: list[Any] = []
    rendered: list[str] = []
    failures = accepted = refused = 0
    if version != "6.4":
        cli.dataset.upload_dataset = lambda *args, **kwargs: {"version_id": "1"}
    code, printed = osmo(
        "login", start_service(credentials, queue, rendered), "--method", "dev", "--username", "someone"
    )
    if code:
        print(f"error: login: {printed}", file=sys.stderr)
        return 1
    for words in submissions(checkout, variants_too):
        outcome, failed = run(words, version, queue, rendered)
        accepted, refused = accepted + outcome.startswith("accepted"), refused + outcome.startswith("refused")
        failures += failed
        print(f"{'FAILED ' if failed else ''}{shlex.join(words[1:])}\n    {outcome}", flush=True)
    for line in not_understood(checkout, without_datasets=version == "6.4"):
        failures += 1
        print(f"FAILED {line}")
    # What a dataset is uploaded as: below the folder's own name, as the tests of the tasks lay it out.
    names = [found.rel_path for found in storage.list_local_files("../rosbag-to-lerobot/local_bags")]
    if names != ["local_bags/day1/recording/recording_0.db3"]:
        failures += 1
        print(f"FAILED the folder is uploaded as {names}")
    print(f"{accepted} submissions accepted, {refused} refused; {failures} failures")
    jinja_sandbox.SandboxedJinjaRenderer.get_instance().shutdown()
    return 1 if failures else 0


if __name__ == "__main__":  # the sandbox starts processes that import this file
    sys.exit(main())
