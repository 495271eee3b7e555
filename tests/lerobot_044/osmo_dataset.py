"""Write a LeRobot v3 dataset of recorded episodes with real LeRobot 0.4.4: what `ur10e-eval-dataset` holds.

    python osmo_dataset.py IN.npz OUT

IN.npz has state_N (T, 6), action_N (T, 6), color_N (T, H, W, 3) uint8 for each episode N. Tests run this in LeRobot's
environment; it imports nothing of ours.
"""

import os
import sys

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402

source, root = np.load(sys.argv[1]), sys.argv[2]
joints = ["shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3"]
vector = {"dtype": "float32", "shape": (6,), "names": joints}
image = {"dtype": "video", "shape": source["color_0"].shape[1:], "names": ["height", "width", "channels"]}
dataset = LeRobotDataset.create(
    "local/x", 30, {"observation.state": vector, "action": vector, "observation.images.color": image}, root=root,
    vcodec="h264",
)  # fmt: skip
for episode in range(sum(name.startswith("state_") for name in source.files)):
    rows = [source[f"{name}_{episode}"] for name in ("state", "action", "color")]
    for state, action, color in zip(*rows, strict=True):
        dataset.add_frame(
            {"observation.state": state, "action": action, "observation.images.color": color, "task": "reach"}
        )
    dataset.save_episode()
dataset.finalize()
