"""What real LeRobot makes of datasets that `python -m rosbag_dataset export` wrote; run by tests/test_exporting.py.

    python exported.py FOLDER DATASET ...
        -> FOLDER/DATASET.npz       every item as LeRobotDataset returns it, pictures as (H, W, 3) uint8
           FOLDER/DATASET.json      what its metadata say, and without videos statistics that LeRobot computes of it
    python exported.py FOLDER DATASET ... -- ARGUMENTS     and then lerobot-train with these

It imports nothing of ours, and runs under LeRobot 0.4.4 and 0.6.1.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import PIL.Image  # noqa: E402
from lerobot.datasets.compute_stats import aggregate_stats, compute_episode_stats  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402


def dump(root: Path, out: Path) -> None:
    dataset = LeRobotDataset("local/x", root=root, video_backend="pyav")
    rows: dict[str, list] = {}
    tasks = []
    for i in range(len(dataset)):
        item = dataset[i]
        tasks.append(item.pop("task"))
        for key, value in item.items():
            array = value.numpy()
            if key in dataset.meta.camera_keys:
                assert np.abs(array * 255 - np.rint(array * 255)).max() < 1e-3
                array = np.rint(array * 255).astype(np.uint8).transpose(1, 2, 0)
            rows.setdefault(key, []).append(array)
    arrays = {key: np.stack(values) for key, values in rows.items()}
    np.savez(out.with_suffix(".npz"), **arrays)
    stats = []
    # Of pictures as they were: those of a video are what the codec made of them.
    for episode in range(0 if dataset.meta.video_keys else dataset.meta.total_episodes):
        inside = arrays["episode_index"] == episode
        of_episode = {key: values[inside] for key, values in arrays.items()}
        for key in dataset.meta.camera_keys:
            files = []
            for i, picture in enumerate(of_episode[key]):
                files.append(str(out.with_name(f"{key}-{episode}-{i}.png")))
                PIL.Image.fromarray(picture).save(files[-1])
            of_episode[key] = files
        stats.append(compute_episode_stats(of_episode, dataset.meta.features))
    aggregated = aggregate_stats(stats) if stats else {}
    as_lists = {key: {name: value.tolist() for name, value in of.items()} for key, of in aggregated.items()}
    meta = dataset.meta
    said = {"lerobot": version("lerobot"), "fps": meta.fps, "robot_type": meta.robot_type, "names": meta.names,
            "episodes": meta.total_episodes, "tasks": tasks, "stats": as_lists}  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(said))


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    train = names[names.index("--") + 1 :] if "--" in names else []
    for name in names[: names.index("--")] if "--" in names else names:
        dump(folder / name, folder / name)
    if train:
        from lerobot.scripts.lerobot_train import main

        sys.argv[1:] = train
        main()
