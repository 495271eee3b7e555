"""Messages to pixels: every encoding as known colours; what cannot be decoded is refused, never guessed at."""

from __future__ import annotations

import struct

import cv2
import numpy as np
import pytest

from rosbag_dataset.images import RAW_ENCODINGS, read_image
from tests.bags import STORE, T0_NS, compressed, encode, image, noise_images
from tests.checks import error_of

PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30], [255, 255, 255], [0, 0, 0]], np.uint8)
PAINTED = PALETTE[[[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]]  # (3, 4, 3)
GREY = np.array([[0, 1, 2, 127], [128, 129, 254, 255], [10, 100, 200, 50]], np.uint8)
WHOLE = GREY.astype(np.uint16) * 256 + 77  # what a 16-bit camera sees; the low byte is not kept
BAYER = ("rggb", "bggr", "gbrg", "grbg")


def grey3(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, axis=2)


def through_cdr(message):
    """As it comes out of a bag."""
    return STORE.deserialize_cdr(STORE.serialize_cdr(message, message.__msgtype__), message.__msgtype__)


def decode(message, resize=None):
    rgb, shape = read_image(through_cdr(message), message.__msgtype__, resize, "here", decode=True)
    assert rgb.dtype == np.uint8 and rgb.flags.c_contiguous and rgb.shape[2] == 3
    return rgb


def pad_rows(pixels, extra, last_row_too=True):
    """-> fields of an Image whose rows are followed by `extra` bytes of rubbish."""
    rows = [row.tobytes() + b"\xaa" * extra for row in pixels]
    data = b"".join(rows) if last_row_too else b"".join(rows)[:-extra]
    return dict(step=len(rows[0]), data=np.frombuffer(data, np.uint8))


alpha = np.full((3, 4, 1), 99, np.uint8)
PAINTED16 = PAINTED.astype(np.uint16) * 256 + 77
RAW_CASES = {
    "rgb8": (PAINTED, PAINTED),
    "bgr8": (PAINTED[..., [2, 1, 0]], PAINTED),
    "rgba8": (np.concatenate([PAINTED, alpha], axis=2), PAINTED),
    "bgra8": (np.concatenate([PAINTED[..., [2, 1, 0]], alpha], axis=2), PAINTED),
    "mono8": (GREY, grey3(GREY)),
    "8UC1": (GREY, grey3(GREY)),
    "8UC3": (PAINTED[..., [2, 1, 0]], PAINTED),
    "8UC4": (np.concatenate([PAINTED[..., [2, 1, 0]], alpha], axis=2), PAINTED),
    "rgb16": (PAINTED16, PAINTED),
    "bgr16": (PAINTED16[..., [2, 1, 0]], PAINTED),
    "mono16": (WHOLE, grey3(GREY)),
    # one level per centimetre: 0 = none, 4 mm, 5.1 mm, 1 cm | 254 cm, 255 cm, 3 m, 65 m | ...
    "16UC1": (
        np.array([[0, 4, 6, 10], [2540, 2550, 3000, 65535], [1000, 1234, 1237, 99]], np.uint16),
        grey3([[0, 0, 1, 1], [254, 255, 255, 255], [100, 123, 124, 10]]),
    ),
    "32FC1": (
        np.array([[0, 0.004, 0.006, 0.01], [2.54, 2.55, 3.0, 1e30], [np.nan, np.inf, -np.inf, -1]], np.float32),
        grey3([[0, 0, 1, 1], [254, 255, 255, 255], [0, 0, 0, 0]]),
    ),
}


def test_every_encoding_has_a_test():
    """Whoever adds an encoding adds its expectation here."""
    bayer = {f"bayer_{p}{bits}" for p in BAYER for bits in (8, 16)}
    assert set(RAW_ENCODINGS) == set(RAW_CASES) | bayer | set(YUV)


@pytest.mark.parametrize("rows", ["plain", "padded", "last-row-short"])
@pytest.mark.parametrize("big", [False, True], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("encoding", RAW_CASES)
def test_raw_encodings(encoding, big, rows):
    """Known colours, greys and depths, with `step` wider than the row, in both byte orders."""
    pixels, want = RAW_CASES[encoding]
    stored = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"))
    padding = {} if rows == "plain" else pad_rows(stored, 5, last_row_too=rows == "padded")
    np.testing.assert_array_equal(decode(image(T0_NS, stored, encoding, is_bigendian=int(big), **padding)), want)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", BAYER)
def test_bayer(pattern, bits):
    """A mosaic of a smooth colour image, built by hand from the pattern's letters, comes back within 2 levels."""
    y, x = np.mgrid[0:32, 0:40]
    rgb = np.stack([40 + 3 * x, 200 - 2 * y, 30 + x + 2 * y], axis=2).astype(np.uint8)
    mosaic = np.zeros((32, 40), np.uint8)
    for i, letter in enumerate(pattern):  # the letters go row by row over each 2x2 cell
        r, c = divmod(i, 2)
        mosaic[r::2, c::2] = rgb[r::2, c::2, "rgb".index(letter)]
    stored = mosaic if bits == 8 else mosaic.astype("<u2") * 256 + 77
    got = decode(image(T0_NS, stored, f"bayer_{pattern}{bits}"))
    inside = np.s_[2:-2, 2:-2]
    assert np.abs(got[inside].astype(int) - rgb[inside]).max() <= 2


def yuv(rgb):
    """(H, W, 3) Y, Cb, Cr of 8-bit RGB by ITU-R BT.601, black to white from 16 to 235."""
    r, g, b = np.moveaxis(rgb / 255, 2, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    planes = np.stack([16 + 219 * y, 128 + 112 * (b - y) / 0.886, 128 + 112 * (r - y) / 0.701], axis=2)
    return np.rint(planes).astype(np.uint8)


def packed(order):
    """-> a function that writes YUV as (H, W, 2): two pixels are four bytes, in this order."""

    def write(planes):
        pairs = planes.reshape(len(planes), -1, 2, 3)
        parts = {"y": pairs[:, :, 0, 0], "Y": pairs[:, :, 1, 0], "u": pairs[:, :, 0, 1], "v": pairs[:, :, 0, 2]}
        return np.stack([parts[letter] for letter in order], axis=2).reshape(*planes.shape[:2], 2)

    return write


def two_planes(order):
    """-> a function that writes YUV as (H * 3 / 2, W): brightness, then for each 2x2 pixels two bytes of colour."""

    def write(planes):
        colours = planes[::2, ::2, [1, 2] if order == "uv" else [2, 1]].reshape(len(planes) // 2, -1)
        return np.concatenate([planes[..., 0], colours])

    return write


YUV = {
    "yuv422": packed("uyvY"), "uyvy": packed("uyvY"), "yuv422_yuy2": packed("yuYv"), "yuyv": packed("yuYv"),
    "nv12": two_planes("uv"), "nv21": two_planes("vu"),
}  # fmt: skip
BLOCKS = np.repeat(np.repeat(PAINTED, 2, axis=0), 2, axis=1)  # (6, 8, 3): what shares its colours has one


@pytest.mark.parametrize("rows", ["plain", "padded", "last-row-short"])
@pytest.mark.parametrize("encoding", YUV)
def test_yuv(encoding, rows):
    """Colours that were turned into YUV by the standard's formula come back within 3 levels, also with padded rows."""
    stored = YUV[encoding](yuv(BLOCKS))
    step = {} if rows == "plain" else pad_rows(stored, 6, last_row_too=rows == "padded")
    message = image(T0_NS, stored, encoding, height=len(BLOCKS), **step)
    assert np.abs(decode(message).astype(int) - BLOCKS).max() <= 3


DEPTH_M = np.array([[0.5, 1.0, 2.0, np.nan], [0.3, 2.54, 9.0, 1.234]], np.float32)


@pytest.mark.parametrize("kind", ["16UC1; compressedDepth png", "16UC1; compressedDepth"])
def test_compressed_depth(kind):
    """Millimetres as PNG behind a header of twelve bytes, as depth that is not compressed."""
    data = bytes(12) + cv2.imencode(".png", RAW_CASES["16UC1"][0])[1].tobytes()
    np.testing.assert_array_equal(decode(compressed(T0_NS, data, kind)), RAW_CASES["16UC1"][1])


def test_compressed_depth_of_floats():
    """Metres are in the PNG as quantised inverses (A / (n - B), 0: no reading): as the raw image, to the centimetre."""
    quantum, depth_max = 100.0, 10.0  # compressed_depth_image_transport's defaults
    a = quantum * (quantum + 1)
    b = 1 - a / depth_max
    stored = np.where(np.isnan(DEPTH_M), 0, a / DEPTH_M + b).astype(np.uint16)
    data = struct.pack("<iff", 0, a, b) + cv2.imencode(".png", stored)[1].tobytes()
    got = decode(compressed(T0_NS, data, "32FC1; compressedDepth png")).astype(int)
    assert np.abs(got - decode(image(T0_NS, DEPTH_M, "32FC1"))).max() <= 1
    assert got[0, :, 0].tolist() == [50, 100, 200, 0]


@pytest.mark.parametrize("size", [(3, 4), (6, 2), (2, 3), (7, 5), (11, 16)], ids=str)
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8", "jpeg"])
def test_resize_is_that_of_opencv(encoding, size):
    """image_resize, with another aspect too: INTER_AREA when it shrinks both ways, else INTER_LINEAR."""
    rgb = cv2.GaussianBlur(noise_images(1, (7, 8), seed=1)[0], (3, 3), 1)
    if encoding == "mono8":
        message, rgb = image(T0_NS, rgb[..., 0], encoding), grey3(rgb[..., 0])
    elif encoding == "jpeg":
        jpeg = encode(rgb, ".jpg")
        message, rgb = compressed(T0_NS, jpeg), cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[..., ::-1].copy()
    else:
        message = image(T0_NS, rgb if encoding == "rgb8" else rgb[..., ::-1], encoding)
    how = cv2.INTER_AREA if size[0] <= 7 and size[1] <= 8 else cv2.INTER_LINEAR
    np.testing.assert_array_equal(decode(message, size), cv2.resize(rgb, size[::-1], interpolation=how))


def with_exif_rotation(jpeg: bytes) -> bytes:
    """The same JPEG with an EXIF tag that asks viewers to turn it by 90 degrees."""
    tiff = b"II*\0" + struct.pack("<IHHHIIHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)[:22]
    segment = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


SMOOTH = cv2.resize(PAINTED, (48, 32), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize(
    ("data", "kind", "want", "levels"),
    [
        (encode(SMOOTH, ".jpg"), "jpeg", SMOOTH, 40),
        (encode(SMOOTH, ".jpg"), "rgb8; jpeg compressed bgr8", SMOOTH, 40),
        (with_exif_rotation(encode(SMOOTH, ".jpg")), "jpeg", SMOOTH, 40),
        (encode(grey3(GREY), ".png"), "png", grey3(GREY), 0),
        (encode(PAINTED, ".png"), "png", PAINTED, 0),
        (encode(PAINTED, ".png"), "bgr8; png compressed bgr8", PAINTED, 0),
        (cv2.imencode(".png", GREY)[1].tobytes(), "mono8; png compressed", grey3(GREY), 0),
        (cv2.imencode(".png", np.dstack([PAINTED[..., ::-1], alpha]))[1].tobytes(), "png", PAINTED, 0),
        (cv2.imencode(".png", RAW_CASES["16UC1"][0])[1].tobytes(), "16UC1; png compressed ", RAW_CASES["16UC1"][1], 0),
        (cv2.imencode(".png", RAW_CASES["16UC1"][0])[1].tobytes(), "16UC1", RAW_CASES["16UC1"][1], 0),
        (cv2.imencode(".png", WHOLE)[1].tobytes(), "mono16; png compressed mono16", grey3(GREY), 0),
    ],
    ids=["jpeg", "rgb8-jpeg", "exif", "png-grey", "png", "bgr8-png", "mono8-png", "rgba-png", "16UC1",
         "16UC1-bare", "mono16"],
)  # fmt: skip
def test_compressed_images(data, kind, want, levels):
    """JPEG and PNG of each format string as RGB; EXIF does not turn a robot's camera."""
    got = decode(compressed(T0_NS, data, kind)).astype(int)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= levels
    assert np.abs(got - want).mean() <= levels / 8
    if levels:  # chroma subsampling blurs edges; a swap of red and blue would be far away
        assert np.abs(got[..., ::-1] - want).mean() > 5 * np.abs(got - want).mean()


def test_exif_fixture_turns_elsewhere():
    """The EXIF case above is a real one: a reader that obeys the tag turns the image."""
    data = np.frombuffer(with_exif_rotation(encode(SMOOTH, ".jpg")), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape[:2] == (48, 32)


SHORT = np.frombuffer(bytes(100), np.uint8)
JPEG, PNG = encode(SMOOTH, ".jpg"), encode(SMOOTH, ".png")
# Some kilobytes that would be 33 MB of pixels, a little more than the limit of an 8K picture.
HUGE_PNG, HUGE_JPEG = (cv2.imencode(kind, np.zeros((4321, 7766), np.uint8))[1].tobytes() for kind in (".png", ".jpg"))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (image(0, PAINTED, data=SHORT[:35]), ["35 bytes", "3x4 rgb8", "36"]),
        (image(0, PAINTED, step=200, data=SHORT), ["100 bytes", "412"]),
        (image(0, PAINTED, data=SHORT[:0]), ["0 bytes"]),
        (image(0, PAINTED, step=11), ["step of 11", "at least 12"]),
        (image(0, PAINTED, height=0), ["0x4"]),
        (image(0, PAINTED, width=0), ["3x0"]),
        (image(0, PAINTED, height=2**32 - 1, width=2**31), ["step"]),
        (image(0, PAINTED, encoding="yuv411"), ["'yuv411'", "rgb8", "bayer_grbg16", "driver publish one of these"]),
        (image(0, PAINTED[:, :3, :2], encoding="yuyv"), ["yuyv image of 3x3", "share colours", "multiples of 1x2"]),
        (image(0, PAINTED[..., 0], encoding="nv12"), ["nv12 image of 3x4", "multiples of 2x2"]),
        (image(0, PAINTED[:2, :, 0], encoding="nv12"), ["8 bytes", "2x4 nv12", "at least 12"]),
        (image(0, PAINTED, encoding=""), ["encoding ''"]),
        (compressed(0, JPEG[: len(JPEG) // 2]), ["JPEG breaks off", str(len(JPEG) // 2)]),
        (compressed(0, JPEG[:-2]), ["JPEG breaks off"]),
        (compressed(0, PNG[: len(PNG) // 2], "png"), ["do not decode"]),
        (compressed(0, PNG[:16] + b"\x00\xff\xff\xff\x00\xff\xff\xff" + PNG[24:], "png"), ["16777215x16777215 (HxW)"]),
        (compressed(0, b""), ["0 bytes", "do not decode"]),
        (compressed(0, b"no picture", "tiff"), ["'tiff'", "do not decode"]),
        (compressed(0, encode(SMOOTH, ".tiff"), "tiff"), ["'tiff'", "do not decode as JPEG or PNG"]),
        (compressed(0, HUGE_PNG, "png"), [f"{len(HUGE_PNG)} bytes", "4321x7766 (HxW)", "33556886 pixels", "33554432"]),
        (compressed(0, HUGE_JPEG), ["4321x7766 (HxW), 33556886 pixels"]),
        (compressed(0, HUGE_JPEG[:2] + b"\0rubbish\xff" + HUGE_JPEG[2:]), ["4321x7766 (HxW), 33556886 pixels"]),
        (compressed(0, with_exif_rotation(HUGE_JPEG)), ["4321x7766 (HxW), 33556886 pixels"]),
        (compressed(0, bytes(12) + PNG, "16UC1; compressedDepth rvl"), ["compressedDepth rvl", "format to png"]),
        (compressed(0, PNG[:11], "16UC1; compressedDepth png"), ["0 bytes", "do not decode"]),
        (compressed(0, bytes(12) + PNG, "16UC1; compressedDepth png"), ["do not hold 16-bit depth"]),
        (compressed(0, bytes(12) + HUGE_PNG, "16UC1; compressedDepth"), ["4321x7766 (HxW), 33556886 pixels"]),
        (compressed(0, cv2.imencode(".png", WHOLE)[1], "png"), ["uint16", "'png'"]),
    ],
    ids=["short", "short-step", "empty", "step", "height", "width", "huge", "yuv", "yuyv-odd", "nv12-odd",
         "nv12-short", "no-encoding", "jpeg-half",
         "jpeg-end", "png-half", "png-huge", "nothing", "tiff", "real-tiff", "png-bomb", "jpeg-bomb", "jpeg-rubbish",
         "jpeg-exif", "depth-rvl", "depth-short", "depth-colour", "depth-bomb", "png-16"],
)  # fmt: skip
def test_bad_images(message, words):
    """A payload that is short, or of a kind that is not supported, is refused and never guessed at."""
    kind = message.__msgtype__
    text = error_of(lambda: read_image(through_cdr(message), kind, None, "a: /camera, message 7", decode=True))
    assert text.startswith("a: /camera, message 7: ")
    assert all(word in text for word in words), text


def test_an_8k_picture_is_read():
    """The limit is above what a camera gives, also with marks between a JPEG's segments that carry nothing."""
    jpeg = cv2.imencode(".jpg", np.full((4320, 7680), 200, np.uint8))[1].tobytes()
    assert (
        decode(compressed(T0_NS, jpeg[:2] + b"\xff\x01\xff\xff" + jpeg[2:]), (2, 2)).tolist() == [[[200] * 3] * 2] * 2
    )
