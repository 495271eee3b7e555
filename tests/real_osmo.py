"""The workflows through OSMO's own code, and the guide's commands through its own command line.

    git clone --branch 6.3.1 https://github.com/NVIDIA/OSMO ../OSMO
    uv venv ../osmo-venv && uv pip install --python ../osmo-venv/bin/python -r ../OSMO/src/requirements.txt
    ../osmo-venv/bin/python -m tests.real_osmo ../OSMO

Each workflow is loaded as `osmo workflow submit` loads it, rendered by the service's sandbox within its default limits
of time and memory, checked by the service's spec classes, its tokens replaced and its files made volumes as for its
pods; the outcome has to be that of our own model (osmo_spec.py), and each command has to parse. Nothing is submitted; a
stand-in exists for the database that the limits would come from. Exit code 1 when anything is refused (6.4 has no
datasets: not counted). 6.3.1 and later need Python 3.12.

Not part of `make test`: it needs OSMO's source, and packages that do not go together with ours.
"""

from __future__ import annotations

import copy
import os
import shlex
import sys
import tempfile
import types
from pathlib import Path

import yaml

from tests.osmo_spec import OSMO, osmo_commands, place, readme_commands, submit, tasks

STORAGE = "storage_url=azure://account/container/prefix"
VARIANTS = {
    "osmo-workflow.yaml": (
        ["steps=10", "memory=64Gi", "platform=p", "overrides=training.lr=5e-5 conventions.image_resize=[240,320]"],
    ),
    "osmo-workflow-ddp.yaml": (["n_nodes=1"], ["n_nodes=2"], ["n_nodes=8"]),
    "osmo-workflow-sweep.yaml": (["wandb=true"], ["lrs=2e-5 4e-5", "kl_weights=10"]),
    "osmo-workflow-blob.yaml": (["blob_credential=", "storage_account=account"],),
    "osmo-workflow-train-eval.yaml": (["eval_args=--rollout --max-mae=0.002", "eval_episodes=0 1"],),
}


def accepted(path: Path, assignments: list[str]) -> str:
    """Have OSMO take the workflow as it would at submission; -> "" or its reason to refuse it."""
    from src.cli import workflow as cli
    from src.utils.job import kb_objects
    from src.utils.job import task as jobs
    from src.utils.job import workflow as service

    def render(template: str) -> dict:
        spec = service.TemplateSpec(
            file=template, set_variables=given.set_variables, set_string_variables=given.set_string_variables
        )
        return yaml.safe_load(spec.load_template_with_variables())

    try:
        given = cli._load_wf_file(str(path), assignments, [])
        spec = render(given.file)
        cli.load_local_files(str(path), spec)  # reads the injected files; datasets are uploaded at another moment
        rendered = render(yaml.dump(spec))
        if rendered != spec:
            return "the second rendering changes it"
        ours = submit(path, *assignments)
        if ours != rendered:
            return "our own model renders it otherwise"
        for task in tasks(rendered):
            for source in task.get("inputs", []):
                if "dataset" in source:  # as the CLI leaves it after the upload
                    source["dataset"].pop("localpath", None)
        workflow = copy.deepcopy(service.VersionedWorkflowSpec(**rendered).workflow)
        for alone in workflow.tasks:
            workflow.groups.append(jobs.TaskGroupSpec(name=f"{alone.name}-group", tasks=[alone]))
        workflow.tasks = []
        workflow._validate_groups()
        placed = place(ours)
        for group in workflow.groups:
            hosts = {f"host:{task.name}": task.name for task in group.tasks}
            for task in group.tasks:
                parsed, mine = task.parse("workflow-1", hosts), placed[task.name]
                if [*parsed.command, *parsed.args] != mine["command"] + mine["args"]:
                    return f"our own model gives {task.name} another command"
                if [f.contents for f in parsed.files] != [f.contents for f in task.files]:
                    return f"a token in a file of {task.name} is replaced"
                factory = kb_objects.K8sObjectFactory.__new__(kb_objects.K8sObjectFactory)  # of no cluster
                mounts = parsed.get_filemounts("0" * 32, factory)
                if any(len({get(m) for m in mounts}) < len(mounts) for get in (lambda m: m.name, lambda m: m.path)):
                    return f"two files of {task.name} are one volume, or in one place: Kubernetes refuses the pod"
    except Exception as error:  # noqa: BLE001 - whatever it is, OSMO does not take it
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1], "src/cli/workflow.py").is_file():
        print("error: expected the folder of an OSMO checkout; see the head of this file", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(sys.argv[1]).resolve()))
    from src.cli.main_parser import create_cli_parser
    from src.lib.utils import jinja_sandbox
    from src.utils import connectors
    from src.utils.connectors import postgres

    limits = types.SimpleNamespace(user_workflow_limits=postgres.UserWorkflowLimitConfig())
    database = types.SimpleNamespace(get_workflow_configs=lambda: limits)
    connectors.PostgresConnector.get_instance = staticmethod(lambda *args, **kwargs: database)
    failures, without_datasets = 0, False
    for path in sorted(OSMO.glob("osmo-workflow*.yaml")):
        for assignments in ([], *VARIANTS.get(path.name, ())):
            for storage in ([], [STORAGE]):
                reason = accepted(path, [*assignments, *storage])
                if not storage and "dataset" in reason:
                    without_datasets, reason = True, "not accepted, this version has no datasets"
                else:
                    failures += bool(reason)
                print(f"{path.name} {' '.join(assignments + storage) or '-'}: {reason or 'accepted'}", flush=True)
    parser, parsed = create_cli_parser(), 0
    with tempfile.TemporaryDirectory() as folder:  # the guide makes the folders that it downloads to
        os.chdir(folder)
        for words in readme_commands():
            if words[0] == "mkdir":
                os.makedirs(words[-1], exist_ok=True)
        for words in osmo_commands():
            if not (words[1] == "dataset" and without_datasets):
                try:
                    parser.parse_args(words[1:])
                    parsed += 1
                except (SystemExit, Exception) as error:  # noqa: BLE001 - argparse exits; OSMO's checks raise theirs
                    failures += 1
                    print(f"{shlex.join(words)}: {error}", flush=True)
        os.chdir(OSMO)
    print(f"{parsed} commands of the guide are understood; {failures} failures")
    jinja_sandbox.SandboxedJinjaRenderer.get_instance().shutdown()
    return 1 if failures else 0


if __name__ == "__main__":  # the sandbox starts processes that import this file
    sys.exit(main())
