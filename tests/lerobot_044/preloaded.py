"""Runs scripts of this folder, each in a fork of a process that has imported LeRobot 0.4.4, which takes ten seconds.

For each line of JSON on stdin, {"script": PATH, "arguments": [...], "path": [FOLDER, ...], "log": FILE}, one line on
stdout: the script's exit code. `path` are further places of modules; what the script prints goes to the log. Ends with
stdin. It imports nothing of ours.
"""

import json
import os
import runpy
import sys
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import lerobot.datasets.lerobot_dataset  # noqa: E402, F401
import lerobot.policies.act.modeling_act  # noqa: E402, F401
import lerobot.policies.factory  # noqa: E402, F401


def run(script: str, arguments: list[str], path: list[str]) -> int:
    """As `python SCRIPT ARGUMENTS` with a PYTHONPATH; -> its exit code."""
    sys.argv, sys.path[:0] = [script, *arguments], [os.path.dirname(script), *path]
    try:
        runpy.run_path(script, run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        return 1


for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(asked.pop("log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1), os.dup2(log, 2)
        code = run(**asked)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
