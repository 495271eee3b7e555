"""Video to pictures: each with the time of its message, as ffmpeg decodes it; what cannot be right is left out."""

from __future__ import annotations

import functools
import io
import sys
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from rosbag_dataset import SetupError, find_bags, load_episodes, read_bag, sync_table, video
from rosbag_dataset.inspection import main
from tests.bags import (
    CAMERA_TOPIC,
    JOINT_TOPIC,
    T0_NS,
    clock,
    compressed_video,
    ffmpeg_packet,
    image,
    joint_state,
    noise_images,
    settings,
    smooth_path,
    write_bag,
)
from tests.checks import error_of, read

HEIGHT, WIDTH, COUNT, GOP = 64, 96, 12, 5  # keyframes are the pictures 0, 5 and 10
CODECS = {
    "h264": ("libx264", {"preset": "ultrafast", "tune": "zerolatency"}, "h264"),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:bframes=0:scenecut=0:pools=1"}, "hevc"),
    "av1": ("libsvtav1", {"preset": "12", "svtav1-params": f"keyint={GOP}:pred-struct=1:lp=1"}, "obu"),
}
MOVING = cv2.normalize(cv2.GaussianBlur(noise_images(1, (96, 160), 0)[0], (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX)


@functools.lru_cache
def stream(codec: str, b_frames: int = 0) -> tuple[tuple[bytes, int], ...]:
    """(packet, number of its picture) of a moving picture, in the order of decoding."""
    encoder, options, _ = CODECS[codec]
    context = av.CodecContext.create(encoder, "w")
    context.width, context.height, context.pix_fmt, context.time_base = WIDTH, HEIGHT, "yuv420p", Fraction(1, 30)
    context.framerate, context.gop_size, context.max_b_frames = 30, GOP, b_frames
    context.options = {"preset": "ultrafast", "x264-params": "scenecut=0"} if b_frames else options
    packets = []
    for i in range(COUNT):
        pixels = np.ascontiguousarray(np.roll(MOVING, 3 * i, axis=1)[:HEIGHT, :WIDTH])
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = i
        packets += context.encode(frame)
    packets += context.encode(None)
    return tuple((bytes(packet), packet.pts) for packet in packets)


def decoded(codec: str, packets: list[bytes]) -> np.ndarray:
    """(N, H, W, 3): what ffmpeg makes of the whole stream, read as a file."""
    with av.open(io.BytesIO(b"".join(packets)), format=CODECS[codec][2]) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def packets_of(codec: str) -> list[bytes]:
    return [data for data, _ in stream(codec)]


def video_bag(path, codec, packets, stamps_ns=None, make=compressed_video, storage="mcap"):
    """A bag with these packets as messages at 30 Hz, and joints beside them; -> the messages' receive times."""
    times = clock(len(packets) / 30, 30, 0.02)
    stamps = times if stamps_ns is None else stamps_ns
    joint_ns = clock(len(packets) / 30 + 0.04, 125)
    joints = [
        (JOINT_TOPIC, int(t), joint_state(int(t), q))
        for t, q in zip(joint_ns, smooth_path((joint_ns - T0_NS) / 1e9), strict=True)
    ]
    camera = [(CAMERA_TOPIC, int(t), make(int(s), p, codec)) for t, s, p in zip(times, stamps, packets, strict=True)]
    write_bag(path, sorted(joints + camera, key=lambda m: m[1]), storage)
    return times


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("make", [compressed_video, ffmpeg_packet], ids=["foxglove", "ffmpeg"])
@pytest.mark.parametrize("codec", CODECS)
def test_pictures_are_those_of_ffmpeg(tmp_path, codec, make, storage):
    """Every codec, message and storage: pixel by pixel what av decodes from the stream as a file, at its own time."""
    packets = packets_of(codec)
    name = {compressed_video: {"hevc": "h265"}, ffmpeg_packet: {"hevc": "hevc_nvenc", "h264": "libx264"}}[make]
    times = video_bag(tmp_path / "bags" / "a", name.get(codec, codec), packets, make=make, storage=storage)
    recording, images = read(tmp_path / "bags")
    np.testing.assert_array_equal(images["color"], decoded(codec, packets))
    np.testing.assert_array_equal(recording.camera_time_ns["color"], times)
    assert recording.dropped_packets == {} and recording.image_shape["color"] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_begins_at_a_keyframe(tmp_path, codec, capsys):
    """What comes before it is dropped, counted and said, by a run and its later starts; the others keep their times."""
    times = video_bag(tmp_path / "bags" / "a", codec, packets_of(codec)[2:])
    recording, images = read(tmp_path / "bags")
    np.testing.assert_array_equal(images["color"], decoded(codec, packets_of(codec))[GOP:])
    np.testing.assert_array_equal(recording.camera_time_ns["color"], times[GOP - 2 :])
    assert recording.dropped_packets == {"color": (GOP - 2, 0)}
    for _ in ("decoded", "from the cache"):
        ((episode,), _) = load_episodes(settings(tmp_path / "bags"), 1, progress=False)
        assert episode.sync_report["dropped_packets"] == {"color": {"before_keyframe": GOP - 2, "later": 0}}
        assert "video of camera color: dropped 3 messages before the first key" in sync_table([episode.sync_report])
    assert (episode.entry / "color.rgb").stat().st_size == (COUNT - GOP) * HEIGHT * WIDTH * 3
    assert main([str(tmp_path / "bags"), "--verify"]) == 0
    assert "dropped 3 messages before the first keyframe" in capsys.readouterr().out


@pytest.mark.parametrize("codec", CODECS)
def test_messages_with_no_picture_and_with_two(tmp_path, codec):
    """They shift nothing: each picture has its own message's time; of two in one message the last counts."""
    packets, pictures = packets_of(codec), decoded(codec, packets_of(codec))
    empty = b"" if codec == "av1" else packets[0][: packets[0].index(b"\0\0\1", 5)]  # H.264, HEVC: parameters alone
    sent = [packets[0], empty, packets[1], packets[2] + packets[3], *packets[4:]]
    times = video_bag(tmp_path / "bags" / "a", codec, sent)
    recording, images = read(tmp_path / "bags")
    np.testing.assert_array_equal(images["color"], pictures[[0, 1, 3, *range(4, COUNT)]])
    np.testing.assert_array_equal(recording.camera_time_ns["color"], times[[0, *range(2, COUNT)]])
    assert recording.dropped_packets == {"color": (0, 1)}


@pytest.mark.parametrize("codec", CODECS)
def test_a_packet_that_does_not_decode(tmp_path, codec):
    """Until the next keyframe no picture is taken, since each builds on that one."""
    packets = packets_of(codec)
    bad = {"h264": packets[2][:40], "av1": packets[2][:40], "hevc": b"\0\0\1" + bytes(40)}[codec]
    times = video_bag(tmp_path / "bags" / "a", codec, [*packets[:2], bad, *packets[3:]])
    recording, images = read(tmp_path / "bags")
    kept = [0, 1, *range(GOP, COUNT)]
    np.testing.assert_array_equal(images["color"], decoded(codec, packets)[kept])
    np.testing.assert_array_equal(recording.camera_time_ns["color"], times[kept])
    assert recording.dropped_packets == {"color": (0, 3)}


@pytest.mark.parametrize("codec", CODECS)
def test_a_packet_that_was_lost(tmp_path, codec):
    """Those that build on it are left out, although ffmpeg shows H.264 with wrong pixels then."""
    packets, pictures = packets_of(codec), decoded(codec, packets_of(codec))
    times = video_bag(tmp_path / "bags" / "a", codec, [*packets[:2], *packets[3:]])
    recording, images = read(tmp_path / "bags")
    np.testing.assert_array_equal(images["color"], pictures[[0, 1, *range(GOP, COUNT)]])
    np.testing.assert_array_equal(recording.camera_time_ns["color"], times[[0, 1, *range(GOP - 1, COUNT - 1)]])
    assert recording.dropped_packets == {"color": (0, 2)}


def test_b_frames_by_their_stamps(tmp_path):
    """Messages come in the order of decoding, pictures in that of time: by header stamps alone they are paired."""
    packets, order = zip(*stream("h264", b_frames=2), strict=True)
    assert list(order) != sorted(order), "there are B frames"
    stamps = T0_NS + 20_000_000 + np.array(order) * 33_333_333
    video_bag(tmp_path / "bags" / "a", "h264", packets, stamps_ns=stamps, make=ffmpeg_packet)
    recording, images = read(tmp_path / "bags", time_source="header")
    np.testing.assert_array_equal(images["color"], decoded("h264", packets))
    np.testing.assert_array_equal(recording.camera_time_ns["color"], np.sort(stamps))
    message = error_of(lambda: read(tmp_path / "bags"))
    assert CAMERA_TOPIC in message and "B frames" in message and "set data.time_source: header" in message


BOMB = {"h264": b"\0\0\1\x41\x80\0", "hevc": b"\0\0\1\x02\1\x80", "av1": b"\x32\x01\0"}  # the start of a picture each


@pytest.mark.parametrize(
    ("codec", "packets", "words"),
    [
        ("h264", packets_of("h264")[1:4], ["no keyframe that decodes, of", "in 3 messages of 'h264'", "Annex B"]),
        ("h264", [b"rubbish"] * 3, ["in 3 messages of 'h264' video", "ffmpeg says: "]),
        ("h264", [b""] * 2, ["in 2 messages of 'h264' video"]),
        ("vp9", [b"x"], ["message 1", "'vp9', expected h264, hevc (h265) or av1", "the raw topic"]),
        *[(codec, [unit * 17], ["message 1", "more than 16 pictures", "expected 1"]) for codec, unit in BOMB.items()],
        ("h264", [b"\0\0\1\x06" * 5000], ["more than 4096 units"]),
        ("hevc", [b"\0\0\1\x4e" * 5000], ["more than 4096 units"]),
        ("av1", [b"\x2a\0" * 5000], ["more than 4096 units"]),
        ("av1", [b"\xff" * 5000, b"\x32\xff\xff"], ["no keyframe"]),
    ],
    ids=["no-keyframe", "rubbish", "empty", "vp9", "h264-bomb", "hevc-bomb", "av1-bomb", "h264-units", "hevc-units",
         "av1-units", "av1-rubbish"],
)  # fmt: skip
def test_bad_video(tmp_path, codec, packets, words):
    """One line: what there is, what is expected, what to do; what asks for endless work is not decoded."""
    video_bag(tmp_path / "bags" / "a", codec, packets)
    message = error_of(lambda: read(tmp_path / "bags"))
    assert message.startswith(f"a: {CAMERA_TOPIC}") and all(word in message for word in words), message


@pytest.mark.parametrize("codec", CODECS)
def test_video_of_too_many_pixels(tmp_path, codec, monkeypatch):
    """One at the limit is read; of a larger one the line says how large it is, also where ffmpeg refuses it."""
    video_bag(tmp_path / "bags" / "a", codec, packets_of(codec))
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * WIDTH)
    assert len(read(tmp_path / "bags")[1]["color"]) == COUNT
    for limit in (HEIGHT * WIDTH - 1, HEIGHT * WIDTH // 4):
        monkeypatch.setattr(video, "MAX_PIXELS", limit)
        message = error_of(lambda: read(tmp_path / "bags"))
        refused = codec == "av1" and limit < HEIGHT * WIDTH / 2  # by dav1d, which does not say how large it is
        words = (
            f"no keyframe that decodes, of at most {limit} pix" if refused else f"6144 pixels, expected at most {limit}"
        )
        assert words in message and (refused or "says that it is 64x96 (HxW)" in message)


def test_two_codecs_on_one_topic(tmp_path):
    """One decoder cannot follow both."""
    codecs = iter(["h264", "av1"])
    make = lambda stamp_ns, packet, _: compressed_video(stamp_ns, packet, next(codecs))  # noqa: E731
    video_bag(tmp_path / "bags" / "a", "", packets_of("h264")[:2], make=make)
    assert "message 2: its video is 'av1', that before it 'h264'" in error_of(lambda: read(tmp_path / "bags"))


def one_picture(width=WIDTH, **options):
    """An H.264 packet of a black picture."""
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt, context.time_base = width, HEIGHT, "yuv420p", Fraction(1, 30)
    context.options = CODECS["h264"][1] | options
    frame = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, width, 3), np.uint8), format="rgb24")
    return b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None)))


def test_a_video_that_changes_its_size(tmp_path):
    """As of any other images: a batch has one size."""
    video_bag(tmp_path / "bags" / "a", "h264", [*packets_of("h264")[:2], one_picture(128)])
    assert "from 64x96 to 64x128 (HxW)" in error_of(lambda: read(tmp_path / "bags"))


def test_a_video_of_colours_that_ffmpeg_cannot_convert(tmp_path):
    """One line."""
    video_bag(tmp_path / "bags" / "a", "h264", [one_picture(**{"x264-params": "colormatrix=YCgCo"})])
    assert "ffmpeg cannot turn yuv420p of colour space 8 into RGB" in error_of(lambda: read(tmp_path / "bags"))


def test_without_av(tmp_path, monkeypatch):
    """One line that names the package, whatever on_bad_bag is: the trainer's environment may lack it."""
    video_bag(tmp_path / "bags" / "a", "h264", packets_of("h264"))
    monkeypatch.setitem(sys.modules, "av", None)
    assert main([str(tmp_path / "bags")]) == 0
    (bag,) = find_bags(tmp_path / "bags")
    with pytest.raises(SetupError, match="takes the package av, which is not installed: uv pip install av"):
        read_bag(bag, settings(tmp_path / "bags", on_bad_bag="skip"), lambda camera, rgb: None)
    with pytest.raises(SetupError, match="package av"):
        load_episodes(settings(tmp_path / "bags", on_bad_bag="skip"), 1, progress=False)


def test_video_beside_images(tmp_path):
    """Two cameras of two kinds, resized: each as alone."""
    packets = packets_of("h264")
    times = video_bag(tmp_path / "bags" / "a", "h264", packets)
    pixels = noise_images(COUNT, (6, 8), seed=3)
    more = [("/wrist", int(t), image(int(t), p)) for t, p in zip(times, pixels, strict=True)]
    joints = [(JOINT_TOPIC, int(t), joint_state(int(t), np.full(6, i / 10))) for i, t in enumerate(times)]
    sent = [(CAMERA_TOPIC, int(t), compressed_video(int(t), p, "h264")) for t, p in zip(times, packets, strict=True)]
    write_bag(tmp_path / "both" / "a", sorted(more + joints + sent, key=lambda m: m[1]))
    cameras = {"wrist": "/wrist", "color": CAMERA_TOPIC}
    _, images = read(tmp_path / "both", camera_topics=cameras, image_resize=[32, 48])
    want = [cv2.resize(p, (48, 32), interpolation=cv2.INTER_AREA) for p in decoded("h264", packets)]
    np.testing.assert_array_equal(images["color"], want)
    want = [cv2.resize(p, (48, 32), interpolation=cv2.INTER_LINEAR) for p in pixels]
    np.testing.assert_array_equal(images["wrist"], want)
