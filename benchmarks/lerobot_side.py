"""What runs under LeRobot's own interpreter, in which nothing of ours is installed; versus_lerobot.py starts it.

    PYTHON lerobot_side.py about                        versions, and the video decoder that works here
    PYTHON lerobot_side.py convert JOB.json OUT.json    write a LeRobotDataset from arrays of frames
    PYTHON lerobot_side.py infer CHECKPOINT INPUT.npz OUTPUT.npz DEVICE

The last one answers questions about the time of select_action. See the functions of these names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["SVT_LOG"] = "1"  # the AV1 encoder says errors only

import numpy as np


def about() -> None:
    """Print {"lerobot", "torch", "video_backend"}: two versions, and what decodes videos here.

    LeRobot takes torchcodec wherever it is installed, even where it cannot be loaded because FFmpeg's libraries are
    missing. A user then asks for pyav instead, and so do we.
    """
    from importlib.metadata import version
    from importlib.util import find_spec

    if find_spec("lerobot") is None or find_spec("lerobot.scripts.lerobot_train") is None:
        sys.exit("its lerobot is missing or too old (no scripts/lerobot_train.py)")
    try:
        import torchcodec.decoders  # noqa: F401

        video_backend = "torchcodec"
    except Exception:  # ImportError, OSError, RuntimeError, as the loader pleases
        video_backend = "pyav"
        import torchvision.io

        if not hasattr(torchvision.io, "VideoReader"):  # LeRobot's way to pyav; gone in torchvision 0.26
            sys.exit("its torchcodec cannot be loaded, and its torchvision cannot read videos either")
    print(json.dumps({"lerobot": version("lerobot"), "torch": version("torch"), "video_backend": video_backend}))


def convert(job: str, out: str) -> None:
    """Write a dataset with LeRobot's own writer, as its documentation says; writes {"seconds", "frames"}.

    JOB.json: {"root", "fps", "joint_names", "streaming_encoding", "vcodec", "episodes": [FOLDER, ...]}; each folder
    holds state.npy and action.npy (n, J) float32, and <camera>.npy (n, H, W, 3) uint8, already at the dataset's size.
    Only from create() to finalize() is timed: the interpreter's start, the imports, reading the bags, synchronising
    and resizing are not.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    settings = json.loads(Path(job).read_text())
    episodes = [{f.stem: np.load(f) for f in sorted(Path(e).glob("*.npy"))} for e in settings["episodes"]]
    cameras = [name for name in episodes[0] if name not in ("state", "action")]
    joints = {"dtype": "float32", "shape": (len(settings["joint_names"]),), "names": settings["joint_names"]}
    features = {"observation.state": joints, "action": joints}
    for camera in cameras:
        shape = episodes[0][camera].shape[1:]
        names = ["height", "width", "channels"]
        features[f"observation.images.{camera}"] = {"dtype": "video", "shape": shape, "names": names}

    begin_s = time.perf_counter()
    dataset = LeRobotDataset.create(
        "local/benchmark",
        settings["fps"],
        features,
        root=settings["root"],
        image_writer_threads=4 * len(cameras),  # lerobot-record's own choice; create()'s is none, which is slower
        **({"streaming_encoding": True} if settings["streaming_encoding"] else {}),
        **({"vcodec": settings["vcodec"]} if "vcodec" in settings else {}),
    )
    frames = 0
    for episode in episodes:
        for t in range(len(episode["state"])):
            frame = {"observation.state": episode["state"][t], "action": episode["action"][t], "task": "reach"}
            frame |= {f"observation.images.{camera}": episode[camera][t] for camera in cameras}
            dataset.add_frame(frame)
            frames += 1
        dataset.save_episode()
    dataset.finalize()
    took_s = time.perf_counter() - begin_s
    Path(out).write_text(json.dumps({"seconds": took_s, "frames": frames}))


def infer(checkpoint: str, inputs: str, outputs: str, device: str) -> None:
    """Answer each line N on stdin with a line of JSON: the milliseconds of N calls.

        {"select_action": [...]}                 of normalised observations, queue emptied before each call
        {"with processors": [...]}               from raw observation to raw action: pre-processor, select_action,
                                                 post-processor

    The action ends on the host both times. First OUTPUT.npz gets the chunk for INPUT.npz, in raw units.
    """
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.device = device
    policy = ACTPolicy.from_pretrained(checkpoint, config=config)
    policy.eval()
    overrides = {"device_processor": {"device": device}}
    preprocess, postprocess = make_pre_post_processors(
        config, pretrained_path=checkpoint, preprocessor_overrides=overrides
    )
    raw = {key: torch.from_numpy(value) for key, value in np.load(inputs).items()}
    normalised = preprocess(dict(raw))

    def select_action() -> None:
        policy.reset()
        policy.select_action(normalised).cpu()

    def with_processors() -> None:
        policy.reset()
        postprocess(policy.select_action(preprocess(dict(raw)))).cpu()

    chunk = postprocess(policy.predict_action_chunk(normalised))
    np.savez(outputs, chunk=chunk.cpu().numpy())
    print("ready", flush=True)
    for line in sys.stdin:
        took_ms: dict[str, list[float]] = {}
        for name, work in (("select_action", select_action), ("with processors", with_processors)):
            took_ms[name] = []
            for _ in range(int(line)):
                begin_s = time.perf_counter()
                work()
                took_ms[name].append(1e3 * (time.perf_counter() - begin_s))
        print(json.dumps(took_ms), flush=True)


if __name__ == "__main__":
    {"about": about, "convert": convert, "infer": infer}[sys.argv[1]](*sys.argv[2:])
