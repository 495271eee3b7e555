"""Write datasets with real LeRobot 0.4.4 (or 0.6.1), and dump what its LeRobotDataset returns for every frame of them.

    python dataset_write.py FOLDER
        -> FOLDER/<name>/          the dataset
           FOLDER/<name>.npz       state, action, timestamp, episode_index, frame_index, and per camera its images as
                                   an array of (H, W, 3) uint8

Tests run this in LeRobot's environment; it imports nothing of ours.
"""

import inspect
import os
import shutil
import sys
from pathlib import Path

import av
import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402

JOINTS = ["shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3"]
CAMERAS = {"color": (48, 64), "wrist": (64, 96)}
# LeRobot 0.4.4 cannot append to an H.264 episode of one or two frames (their decode times overlap), only to AV1.
SMALL_FILES = dict(chunks_size=2, data_files_size_in_mb=0.003, video_files_size_in_mb=0.006)
DATASETS = {
    # all episodes in one file
    "joined": dict(fps=7, vcodec="libsvtav1", lengths=(9, 4, 13, 1, 8), sizes=None),
    # several files in each chunk, several chunks, one or two episodes in each file
    "split": dict(fps=30, vcodec="h264", lengths=(9, 4, 13, 7, 8), sizes=SMALL_FILES),
    "half": dict(fps=12.5, vcodec="libsvtav1", lengths=(5, 6), sizes=None),
    # images in the parquet files
    "images": dict(fps=12.5, vcodec=None, lengths=(5, 6, 8, 3), sizes={**SMALL_FILES, "data_files_size_in_mb": 0.015}),
}
# "joined" with its videos in other codecs and key frames far apart, as other tools write them. Without B frames:
# where there are any, LeRobot's seek may land behind the frame that it wants, and it gives up.
REENCODED = {
    "joined-mpeg4": ("mpeg4", {"g": "12", "bf": "0", "q:v": "3"}),
    "joined-h264": ("libx264", {"g": "12", "bf": "0", "sc_threshold": "0"}),
}


class Rate(float):
    """A frame rate that is not whole: LeRobot hands it to the encoder, which wants a fraction, and to json."""

    numerator = property(lambda self: self.as_integer_ratio()[0])
    denominator = property(lambda self: self.as_integer_ratio()[1])


def picture(episode: int, frame: int, shape: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8, unlike any other frame's even after lossy compression: 4x4 blocks of random colours."""
    rng = np.random.default_rng([episode, frame, *shape])
    blocks = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return np.repeat(np.repeat(blocks, shape[0] // 4, axis=0), shape[1] // 4, axis=1)


def encoder(vcodec: str) -> dict:
    """How this LeRobot is told the codec."""
    if "vcodec" in inspect.signature(LeRobotDataset.create).parameters:
        return {"vcodec": vcodec}
    from lerobot.configs import RGBEncoderConfig  # since 0.5

    return {"rgb_encoder": RGBEncoderConfig(vcodec=vcodec)}


def write(root: Path, fps: float, vcodec: str | None, lengths: tuple[int, ...], sizes: dict | None) -> None:
    kind = "video" if vcodec else "image"
    features = {
        "observation.state": {"dtype": "float32", "shape": (6,), "names": JOINTS},
        "action": {"dtype": "float32", "shape": (6,), "names": JOINTS},
    }
    for camera, shape in CAMERAS.items():
        features[f"observation.images.{camera}"] = {
            "dtype": kind,
            "shape": (*shape, 3),
            "names": ["height", "width", "channels"],
        }
    dataset = LeRobotDataset.create(
        "local/x", fps if fps == int(fps) else Rate(fps), features, root=root, use_videos=bool(vcodec),
        video_backend="pyav", metadata_buffer_size=1 if sizes else 10, **encoder(vcodec or "h264"),
    )  # fmt: skip
    if sizes:
        dataset.meta.update_chunk_settings(**sizes)
    for episode, length in enumerate(lengths):
        path = np.random.default_rng(episode).normal(0, 0.02, (length + 1, 6)).cumsum(axis=0).astype(np.float32)
        for frame in range(length):
            images = {f"observation.images.{c}": picture(episode, frame, shape) for c, shape in CAMERAS.items()}
            dataset.add_frame(
                {"observation.state": path[frame], "action": path[frame + 1], "task": f"task {episode % 2}", **images}
            )
        dataset.save_episode()
    dataset.finalize()


def reencode(root: Path, codec: str, options: dict[str, str]) -> None:
    for file in root.glob("videos/**/*.mp4"):
        with av.open(str(file)) as source:
            frames = list(source.decode(video=0))
            rate = source.streams.video[0].average_rate
        with av.open(str(file), "w") as target:
            stream = target.add_stream(codec, rate, options=options)
            stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
            for i, frame in enumerate(frames):
                frame.pts, frame.time_base, frame.pict_type = i, 1 / rate, 0
                target.mux(stream.encode(frame))
            target.mux(stream.encode())


def dump(root: Path, out: Path) -> None:
    """What LeRobotDataset returns. Its images are float32 in [0, 1], (3, H, W): uint8 / 255, so exact to undo."""
    dataset = LeRobotDataset("local/x", root=root, video_backend="pyav")
    rows: dict[str, list] = {}
    for i in range(len(dataset)):
        item = dataset[i]
        for key in ("observation.state", "action", "timestamp", "episode_index", "frame_index"):
            rows.setdefault(key, []).append(item[key].numpy())
        for camera in CAMERAS:
            image = item[f"observation.images.{camera}"].numpy() * 255
            assert np.abs(image - np.rint(image)).max() < 1e-3
            rows.setdefault(camera, []).append(np.rint(image).astype(np.uint8).transpose(1, 2, 0))
    np.savez(out, **{key: np.stack(values) for key, values in rows.items()})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, settings in DATASETS.items():
        write(folder / name, **settings)
        dump(folder / name, folder / f"{name}.npz")
    for name, (codec, options) in REENCODED.items():
        shutil.copytree(folder / "joined", folder / name)
        reencode(folder / name, codec, options)
        dump(folder / name, folder / f"{name}.npz")
