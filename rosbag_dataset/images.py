"""An Image or CompressedImage message to 8-bit RGB pixels of the wanted size.

Knows: encodings, byte orders, row padding, depth as grey, resizing, and how large a picture may be.
Must not know: where a message comes from, when it was taken, where the pixels go, and video, whose pictures need those
before them (video.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from .errors import BagError

IMAGE_TYPE = "sensor_msgs/msg/Image"
COMPRESSED_TYPE = "sensor_msgs/msg/CompressedImage"

# Depth (16UC1 in mm, 32FC1 in m) becomes one grey level per centimetre: 0 = no reading, 255 = 2.55 m or farther.
DEPTH_M_PER_LEVEL = 0.01
# The largest compressed picture that is decoded: 8K (7680x4320) just fits. Some hundred kilobytes of PNG may say 30,000
# x 30,000 pixels, which would be gigabytes in memory.
MAX_PIXELS = 1 << 25
# What stands before the PNG of compressed depth: its kind, then the two parameters of the quantisation
# (compressed_depth_image_transport's ConfigHeader).
DEPTH_HEADER = struct.Struct("<iff")
RESIZE_INTERPOLATION = "cv2.INTER_AREA when shrinking, cv2.INTER_LINEAR when enlarging"


def _upper_byte(a: np.ndarray) -> np.ndarray:
    return (a >> 8).astype(np.uint8)


# encoding -> (dtype, channels, what turns it into 8-bit RGB). 8UC3 and 8UC4 say nothing of colours: OpenCV's order, as
# RViz takes it. YUV is BT.601 with 16 to 235 for black to white, as cameras send it.
RAW_ENCODINGS: dict[str, tuple[str, int, Callable[[np.ndarray], np.ndarray]]] = {
    "rgb8": ("u1", 3, lambda a: a),
    "bgr8": ("u1", 3, lambda a: cv2.cvtColor(a, cv2.COLOR_BGR2RGB)),
    "rgba8": ("u1", 4, lambda a: cv2.cvtColor(a, cv2.COLOR_RGBA2RGB)),
    "bgra8": ("u1", 4, lambda a: cv2.cvtColor(a, cv2.COLOR_BGRA2RGB)),
    "mono8": ("u1", 1, lambda a: cv2.cvtColor(a, cv2.COLOR_GRAY2RGB)),
    "8UC1": ("u1", 1, lambda a: cv2.cvtColor(a, cv2.COLOR_GRAY2RGB)),
    "8UC3": ("u1", 3, lambda a: cv2.cvtColor(a, cv2.COLOR_BGR2RGB)),
    "8UC4": ("u1", 4, lambda a: cv2.cvtColor(a, cv2.COLOR_BGRA2RGB)),
    "rgb16": ("u2", 3, _upper_byte),
    "bgr16": ("u2", 3, lambda a: cv2.cvtColor(_upper_byte(a), cv2.COLOR_BGR2RGB)),
    "mono16": ("u2", 1, lambda a: cv2.cvtColor(_upper_byte(a), cv2.COLOR_GRAY2RGB)),
    "16UC1": ("u2", 1, lambda a: depth_to_rgb(a * np.float32(1e-3))),
    "32FC1": ("f4", 1, lambda a: depth_to_rgb(a)),
    "yuv422": ("u1", 2, lambda a: cv2.cvtColor(a, cv2.COLOR_YUV2RGB_UYVY)),
    "yuv422_yuy2": ("u1", 2, lambda a: cv2.cvtColor(a, cv2.COLOR_YUV2RGB_YUY2)),
    "nv12": ("u1", 1, lambda a: cv2.cvtColor(a, cv2.COLOR_YUV2RGB_NV12)),
    "nv21": ("u1", 1, lambda a: cv2.cvtColor(a, cv2.COLOR_YUV2RGB_NV21)),
}
for _old, _new in (("yuv422", "uyvy"), ("yuv422_yuy2", "yuyv")):  # what newer drivers call them
    RAW_ENCODINGS[_new] = RAW_ENCODINGS[_old]
for _bayer in ("RGGB", "BGGR", "GBRG", "GRBG"):
    _code = getattr(cv2, f"COLOR_Bayer{_bayer}2RGB")
    RAW_ENCODINGS[f"bayer_{_bayer.lower()}8"] = ("u1", 1, lambda a, c=_code: cv2.cvtColor(a, c))
    RAW_ENCODINGS[f"bayer_{_bayer.lower()}16"] = (
        "u2", 1, lambda a, c=_code: cv2.cvtColor(_upper_byte(a), c),
    )  # fmt: skip
# Encodings whose pixels share colours: height and width must be multiples of these. Of two planes the second, with the
# colours, follows the first in half as many rows.
SHARED_COLOURS = dict.fromkeys(("yuv422", "uyvy", "yuv422_yuy2", "yuyv"), (1, 2)) | dict.fromkeys(
    ("nv12", "nv21"), (2, 2)
)
TWO_PLANES = ("nv12", "nv21")


def read_image(
    message: Any, msgtype: str, resize: tuple[int, int] | None, where: str, decode: bool
) -> tuple[np.ndarray | None, tuple[int, int] | None]:
    """The pixels of one message and the size they were recorded in.

    Args:
        message: a sensor_msgs Image or CompressedImage.
        msgtype: which of the two: IMAGE_TYPE or COMPRESSED_TYPE.
        resize: (H, W) to bring the pixels to, or None.
        where: bag, topic and message number, for errors.
        decode: False checks an Image's header and size without touching pixels, and a CompressedImage not at all.

    Returns:
        ((H, W, 3) uint8 RGB, resized, or None without `decode`;
         (H, W) as recorded, or None where it would take decoding to know).

    Raises:
        BagError: unknown encoding, wrong sizes, a short payload, a compressed image that does not decode.
    """
    if msgtype == COMPRESSED_TYPE:
        if not decode:
            return None, None
        image = _decompress(message, where)
        return resize_image(image, resize), image.shape[:2]
    if message.encoding not in RAW_ENCODINGS:
        raise BagError(
            f"{where}: image encoding {message.encoding!r} is not one of {', '.join(RAW_ENCODINGS)}; have the camera's "
            "driver publish one of these, or record its compressed topic"
        )
    code, channels, to_rgb = RAW_ENCODINGS[message.encoding]
    dtype = np.dtype(code).newbyteorder(">" if message.is_bigendian else "<")
    height, width, step, data = message.height, message.width, message.step, message.data
    row = width * channels * dtype.itemsize
    if not height or not width or step < row:
        raise BagError(
            f"{where}: {message.encoding} image of {height}x{width} (HxW) with a step of {step} bytes, "
            f"expected at least {row}"
        )
    multiple = SHARED_COLOURS.get(message.encoding, (1, 1))
    if height % multiple[0] or width % multiple[1]:
        raise BagError(
            f"{where}: {message.encoding} image of {height}x{width} (HxW), whose pixels share colours: expected "
            f"multiples of {height_by_width(multiple)}"
        )
    rows = height * 3 // 2 if message.encoding in TWO_PLANES else height
    needed = step * (rows - 1) + row  # the last row needs no padding
    if data.size < needed:
        raise BagError(
            f"{where}: image payload is {data.size} bytes, its header says {height}x{width} {message.encoding} "
            f"with step {step}: at least {needed}"
        )
    if not decode:
        return None, (height, width)
    strides = (step, channels * dtype.itemsize, dtype.itemsize)
    pixels = np.ndarray((rows, width, channels), dtype, data, strides=strides)
    if not dtype.isnative:
        pixels = pixels.astype(dtype.newbyteorder("="))
    pixels = np.ascontiguousarray(pixels if channels > 1 else pixels[..., 0])
    if message.encoding in ("rgb8", "bgr8"):  # plain colour: resize first, there are fewer pixels to swap
        return to_rgb(resize_image(pixels, resize)), (height, width)
    return resize_image(to_rgb(pixels), resize), (height, width)


def _decompress(message: Any, where: str) -> np.ndarray:
    """JPEG or PNG payload to (H, W, 3) uint8 RGB. EXIF rotation is ignored: a robot's camera does not turn.

    Compressed depth is a PNG behind a header of its own; floats are in it as quantised inverses of the distance.
    """
    kind = message.format
    data, quantisation = np.asarray(message.data, np.uint8), None
    if "compressedDepth" in kind:
        if "rvl" in kind:
            raise BagError(
                f"{where}: format {kind!r}: depth that is compressed as RVL is not read; set the publisher's parameter "
                "compressedDepth.format to png, or record the raw depth topic"
            )
        if data.size >= DEPTH_HEADER.size:
            _, *quantisation = DEPTH_HEADER.unpack_from(data.data)
        data = data[DEPTH_HEADER.size :]
    size = _declared_size(data)
    if size is None:
        raise BagError(f"{where}: {data.size} bytes with format {kind!r} do not decode as JPEG or PNG")
    if size[0] * size[1] > MAX_PIXELS:
        raise BagError(
            f"{where}: the {data.size} bytes of this picture say that it is {height_by_width(size)} (HxW), "
            f"{size[0] * size[1]} pixels, expected at most {MAX_PIXELS}; leave the bag out with data.on_bad_bag: skip"
        )
    if data[:2].tobytes() == b"\xff\xd8" and b"\xff\xd9" not in data[-64:].tobytes():
        raise BagError(f"{where}: the JPEG breaks off after {data.size} bytes (no end marker)")
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:  # an absurd size in a damaged header
        pixels = None
    if pixels is None:
        raise BagError(f"{where}: {data.size} bytes with format {kind!r} do not decode as JPEG or PNG")
    if quantisation and (pixels.dtype != np.uint16 or pixels.ndim != 2):
        raise BagError(
            f"{where}: {message.data.size} bytes with format {kind!r} do not hold 16-bit depth; record it again"
        )
    if quantisation and kind.startswith("32FC1"):
        scale, shift = np.array(quantisation, np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is no reading
            return depth_to_rgb(np.where(pixels > 0, scale / (pixels - shift), np.float32(np.nan)))
    if pixels.dtype == np.uint16 and pixels.ndim == 2 and kind.startswith(("16UC1", "mono16")):
        return RAW_ENCODINGS["16UC1" if kind.startswith("16UC1") else "mono16"][2](pixels)
    if pixels.dtype != np.uint8:
        raise BagError(f"{where}: {pixels.dtype} pixels with format {kind!r}; expected 8-bit colour, 16UC1 or mono16")
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _declared_size(data: np.ndarray) -> tuple[int, int] | None:
    """(H, W) from the header of a JPEG or PNG, or None when it is neither, or breaks off before.

    PNG: the IHDR chunk, which comes first (RFC 2083, 4.1.1). JPEG: the first SOF segment (ITU-T T.81, B.2.2); what
    stands between segments is passed over, as libjpeg does.
    """
    content = data.data
    if bytes(content[:8]) == b"\x89PNG\r\n\x1a\n" and data.size >= 24:
        width, height = struct.unpack_from(">II", content, 16)
        return height, width
    if bytes(content[:2]) != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= data.size:
        if content[at] != 0xFF or content[at + 1] in (0x00, 0xFF):
            at += 1
            continue
        marker = content[at + 1]
        if marker in (0x01, *range(0xD0, 0xD9)):  # TEM, RSTn, SOI: without a segment
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # DHT, JPG, DAC are no frames
            height, width = struct.unpack_from(">HH", content, at + 5)
            return height, width
        elif marker in (0xD9, 0xDA):  # the end, or pixels before any frame
            return None
        else:
            at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    return None


def depth_to_rgb(depth_m: np.ndarray) -> np.ndarray:
    """Depth (H, W), floats in metres, to grey (H, W, 3) uint8 with DEPTH_M_PER_LEVEL metres per level.

    nan, inf and negative values (no reading) become 0, and everything from 2.55 m on becomes 255.
    """
    levels = np.nan_to_num(depth_m / DEPTH_M_PER_LEVEL, nan=0.0, posinf=0.0, neginf=0.0)
    return cv2.cvtColor(np.clip(np.rint(levels), 0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def resize_image(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8 to `size` = (H, W), as RESIZE_INTERPOLATION says; unchanged when `size` is None."""
    if size is None or image.shape[:2] == size:
        return image
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def height_by_width(shape: tuple[int, int]) -> str:
    """(480, 640) -> "480x640", as error messages write an image's size."""
    return f"{shape[0]}x{shape[1]}"
