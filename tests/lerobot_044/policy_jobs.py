"""Our PolicyRunner under LeRobot 0.4.4, and a dataset that 0.4.4 writes; run by tests/policies.py.

python policy_jobs.py FOLDER      runs every job in FOLDER/jobs.json, a list of [function, arguments]
"""

import json
import sys
from pathlib import Path

import numpy as np
import reference  # beside this file; sets HF_HUB_OFFLINE
from ur10e_deploy.config import PolicyError
from ur10e_deploy.policy_runner import PolicyRunner

from lerobot_checkpoint import CheckpointError


def write(**arguments) -> None:
    """A policy with random weights, saved as 0.4.4 does."""
    reference.write(**arguments)


def run_policies(policies: dict[str, list], out: str) -> None:
    """{name: [checkpoint, observation, said]} -> {name: {backend asked for: chunk and notes, or the one line}}."""
    results: dict = {}
    for name, (checkpoint, observation, said) in policies.items():
        arrays = dict(np.load(observation))
        state = arrays.pop("state")
        results[name] = {}
        for backend in ("lerobot", "native", "auto"):
            try:
                runner = PolicyRunner(checkpoint, backend=backend, device="cpu", said=said)
                chunk = runner.predict_chunk(state, arrays)
            except (PolicyError, CheckpointError) as error:
                results[name][backend] = {"error": str(error)}
                continue
            used = {"backend": runner.backend, "version": runner.backend_version, "notes": runner.notes}
            results[name][backend] = used | {"chunk": chunk.tolist()}
    Path(out).write_text(json.dumps(results))


def write_dataset(folder: str, names: list[str]) -> None:
    """FOLDER/dataset: the two episodes as a LeRobot dataset with images (PNG, lossless); the last frame of a bag has
    no action, here it is zero, as converters write it."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    episodes = [np.load(Path(folder) / f"episode{i}.npz") for i in (0, 1)]
    joints = {"dtype": "float32", "shape": (len(names),), "names": names}
    features = {
        "observation.state": joints,
        "action": joints,
        "observation.images.color": {
            "dtype": "image", "shape": episodes[0]["color"].shape[1:], "names": ["height", "width", "channels"],
        },
    }  # fmt: skip
    dataset = LeRobotDataset.create("local/bags", 30, features, root=Path(folder) / "dataset", use_videos=False)
    for episode in episodes:
        for state, action, image in zip(episode["state"], episode["action"], episode["color"], strict=True):
            frame = {"observation.state": state, "action": np.nan_to_num(action), "observation.images.color": image}
            dataset.add_frame(frame | {"task": "reach"})
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    for function, arguments in json.loads((Path(sys.argv[1]) / "jobs.json").read_text()):
        globals()[function](**arguments)
