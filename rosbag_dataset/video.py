"""A camera's video, packet by packet, to 8-bit RGB pictures, each with the time of the message that it came in.

A video's picture needs those before it, back to the last keyframe. So a decoder has a memory, and it hands a picture
out when it is sure of it: some messages later, or after the last one.

Knows: H.264, HEVC and AV1 by way of the package av (ffmpeg), which is imported only when a bag has video; keyframes;
how much work a message of a stranger may ask for (docs/trust.md).
Must not know: where a message comes from, and where the pixels go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from .errors import BagError, SetupError
from .images import MAX_PIXELS, height_by_width

# Message types that no distribution of ROS knows by itself, with their definitions: sqlite3 bags from before Iron hold
# none, and those in an mcap are not looked at (storage.py). From foxglove/schemas, and ffmpeg_image_transport_msgs.
VIDEO_TYPES = {
    "foxglove_msgs/msg/CompressedVideo": """
        builtin_interfaces/Time timestamp
        string frame_id
        uint8[] data
        string format
    """,
    "ffmpeg_image_transport_msgs/msg/FFMPEGPacket": """
        std_msgs/Header header
        int32 width
        int32 height
        string encoding
        uint64 pts
        uint8 flags
        bool is_bigendian
        uint8[] data
    """,
}
# What the name of a codec in a message contains (`h265`, `hevc_nvenc`, `libx264;yuv420p;bgr8;bgr8`) -> the decoder.
# ffmpeg's own one of AV1 needs special hardware.
DECODERS = {"264": "h264", "265": "hevc", "hevc": "hevc", "av1": "libdav1d"}
# A message holds one picture (AV1: and some that are not shown). Twenty bytes can ask for another one of 33 million
# pixels, and a message can have 128 million bytes: so what is in it is counted before it is decoded. A picture may
# consist of many units, for example of one per 1400 bytes.
MAX_PICTURES, MAX_UNITS = 16, 4096

# Kinds of units that stand before a picture: parameter sets, delimiters, messages about it.
BEFORE_A_PICTURE = {"h264": (6, 7, 8, 9), "hevc": (32, 33, 34, 35, 39)}
_UNIT = re.compile(rb"\x00\x00\x01(?=(...))", re.DOTALL)  # a unit of H.264 or HEVC begins, in a stream ("Annex B")


class VideoDecoder:
    """One camera's stream: give it each message in the order of recording, then take what is left with finish().

    Pictures come in the order in which they are shown. Those that cannot be right are left out: before the first
    keyframe, and from a packet that does not decode, or is missing, to the next keyframe. Of several in one message the
    last counts.
    """

    def __init__(self) -> None:
        self._codec = ""  # as the messages call it
        self._context: Any = None
        self._times_ns: list[int] = []  # of each message
        self._shown: list[int] = []  # numbers of the messages whose pictures were handed out, in that order
        self._whole = False  # whether every picture since a keyframe has decoded
        self._numbers = _FrameNumbers()
        self._held: Any = None  # the newest picture: another one of the same message may replace it
        self._fault = ""  # why the last packet that did not decode did not

    @property
    def before_keyframe(self) -> int:
        """The number of messages before the one of the first picture; all of them if there was none."""
        return self._shown[0] if self._shown else len(self._times_ns)

    @property
    def without_picture(self) -> int:
        """The number of messages after that from which no picture was handed out."""
        return len(self._times_ns) - self.before_keyframe - len(self._shown)

    def add(self, message: Any, time_ns: int, where: str) -> Iterator[tuple[int, np.ndarray]]:
        """Decode the next message, and yield the pictures that are ready.

        Args:
            message: of one of VIDEO_TYPES.
            time_ns: its time.
            where: bag, topic and message number, for errors.

        Yields:
            (time in ns of the message that the picture came in, (H, W, 3) uint8 RGB).

        Raises:
            SetupError: the package av is not installed.
            BagError: a codec that is not read, too large or too many pictures, or times that run backwards.
        """
        codec = str(message.encoding.partition(";")[0] if hasattr(message, "encoding") else message.format)
        if self._context is None:
            self._codec, self._context = codec, _open_decoder(codec, where)
        if codec != self._codec:
            raise BagError(f"{where}: its video is {codec!r}, that before it {self._codec!r}; record one of them only")
        data, number = bytes(message.data), len(self._times_ns)
        self._times_ns.append(time_ns)
        units, pictures, starts = _layout(data, self._context.name)
        if units > MAX_UNITS or pictures > MAX_PICTURES:
            raise BagError(
                f"{where}: more than {MAX_PICTURES if pictures > MAX_PICTURES else MAX_UNITS} "
                f"{'pictures' if pictures > MAX_PICTURES else 'units'} of video in one message, expected 1 picture; "
                "record it again, or leave it out with data.on_bad_bag: skip"
            )
        if not data:  # ffmpeg would take it for the end
            return
        if self._context.name == "h264" and self._numbers.one_is_missing(data):
            self._whole = False  # ffmpeg would go on with wrong pixels; of HEVC and AV1 it says itself what it lacks
        for start, stop in zip(starts, [*starts[1:], len(data)], strict=True):
            packet = _packet(data[start:stop])
            packet.pts = packet.dts = number  # comes out again with the picture
            yield from self._decode(packet, where, damaged_without_picture=pictures > 0)

    def finish(self, where: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the pictures that are left after the last message, as add() does; `where` is the bag and the topic.

        Raises:
            BagError: as add(); there was no picture at all.
        """
        if self._context is None:
            return
        yield from self._decode(None, where, damaged_without_picture=False)
        if self._held is not None:
            yield self._hand_out(self._held, where)
        if not self._shown:
            fault = f" (ffmpeg says: {self._fault})" if self._fault else ""
            raise BagError(
                f"{where}: no keyframe that decodes, of at most {MAX_PIXELS} pixels, in {len(self._times_ns)} messages "
                f"of {self._codec!r} video{fault}; "
                "record it with a keyframe and its parameter sets every second or so, one picture a message, as a "
                "stream (Annex B; AV1: low overhead format), or leave it out with data.on_bad_bag: skip"
            )

    def _decode(self, packet: Any, where: str, damaged_without_picture: bool) -> Iterator[tuple[int, np.ndarray]]:
        try:
            pictures = self._context.decode(packet)
        except _ffmpeg_error() as error:
            # To ffmpeg, a packet of parameter sets alone is an error, too.
            self._whole &= not damaged_without_picture
            self._fault, pictures = " ".join(str(error).split()), []
        self._check_size(where)
        for picture in pictures:
            self._whole = (self._whole or picture.key_frame) and not picture.is_corrupt
            if not self._whole:
                continue
            if self._held is not None and self._held.pts != picture.pts:
                yield self._hand_out(self._held, where)
            self._held = picture

    def _hand_out(self, picture: Any, where: str) -> tuple[int, np.ndarray]:
        """A decoded picture with its message's time, as RGB."""
        number, last = int(picture.pts), self._shown[-1] if self._shown else 0
        late_ns = self._times_ns[last] - self._times_ns[number]
        if number < last and late_ns > 0:
            raise BagError(
                f"{where}: a video with B frames: the picture of its message {number + 1} is shown after that of "
                f"message {last + 1}, whose time is {late_ns / 1e9:.3f} s later; set data.time_source: header, or "
                "record it without B frames"
            )
        self._shown.append(number)
        try:
            return self._times_ns[number], picture.to_ndarray(format="rgb24")
        except _ffmpeg_error() as error:
            raise BagError(
                f"{where}: ffmpeg cannot turn {picture.format.name} of colour space {int(picture.colorspace)} into "
                "RGB; record it again, or leave it out with data.on_bad_bag: skip"
            ) from error

    def _check_size(self, where: str) -> None:
        """Say that a picture is too large; far too large a one ffmpeg has refused before it made room for it."""
        size = self._context.height, self._context.width
        if size[0] * size[1] > MAX_PIXELS:
            raise BagError(
                f"{where}: its video says that it is {height_by_width(size)} (HxW), {size[0] * size[1]} pixels, "
                f"expected at most {MAX_PIXELS}; leave the bag out with data.on_bad_bag: skip"
            )


def _open_decoder(codec: str, where: str) -> Any:
    """A codec context of av, in one thread: the decoding of several bags at once keeps the cores busy.

    Raises:
        SetupError: there is no av, or one without that decoder.
        BagError: another codec.
    """
    found = next((decoder for part, decoder in DECODERS.items() if part in codec.lower()), None)
    if found is None:
        raise BagError(
            f"{where}: its video is {codec!r}, expected h264, hevc (h265) or av1; record it as one of these, or record "
            "the raw topic"
        )
    try:
        import av
    except ModuleNotFoundError:
        raise SetupError(
            f"{where}: its video is {codec!r}, to decode which takes the package av, which is not installed: "
            "uv pip install av (or pip)"
        ) from None
    av.logging.set_level(None)  # its own default, which torchvision changes; our one line says what is wrong
    try:
        context: Any = av.CodecContext.create(found, "r")
    except ValueError:  # its UnknownCodecError
        raise SetupError(
            f"{where}: its video is {codec!r}, and the installed av was built without a decoder for it ({found}); "
            "install av's own wheel: uv pip install --reinstall av"
        ) from None
    context.thread_count, context.thread_type = 1, "NONE"
    context.options = {"max_pixels": str(2 * MAX_PIXELS)}  # it counts in rows that are longer than they look
    context.open()
    return context


def _ffmpeg_error() -> type[Exception]:
    """What av raises where ffmpeg fails; only after _open_decoder()."""
    import av

    return av.FFmpegError


def _packet(data: bytes) -> Any:
    """What av decodes; only after _open_decoder(). Its parser would find the packets, too, but can crash on damage."""
    import av

    return av.Packet(data)


def _layout(data: bytes, decoder: str) -> tuple[int, int, list[int]]:
    """What is in a message: looks no further than just beyond the limits.

    H.264 (ITU-T H.264, 7.3.1 and 7.4.1.2.3) and HEVC (H.265, 7.3.1.2 and 7.4.2.4.4): start codes are looked for; the
    first slice of a picture begins with a bit that is set. AV1 (its specification, 5.3): each unit has its length.

    Returns:
        (number of units, number of pictures that begin, where each packet begins: one per picture, since of several in
        one packet ffmpeg may show one; AV1 may have them in one).
    """
    units, pictures, starts = 0, 0, [0]
    if decoder == "libdav1d":
        at = 0
        while at < len(data) and units <= MAX_UNITS and pictures <= MAX_PICTURES:
            units += 1
            pictures += data[at] >> 3 & 15 in (3, 6)  # a frame's header, alone or with the frame
            if not data[at] & 2:  # no length: up to the end
                break
            at += 2 if data[at] & 4 else 1
            length = 0
            for shift in range(0, 56, 7):
                byte = data[at] if at < len(data) else 0
                length |= (byte & 127) << shift
                at += 1
                if byte < 128:
                    break
            at += length
        return units, pictures, starts
    begun = False  # whether the packet has a picture already
    for unit in _UNIT.finditer(data):
        kind, in_slice = (unit[1][0] & 31, unit[1][1]) if decoder == "h264" else (unit[1][0] >> 1 & 63, unit[1][2])
        is_slice = kind in (1, 2, 5) if decoder == "h264" else kind < 32
        first = is_slice and in_slice >= 128
        if begun and (first or kind in BEFORE_A_PICTURE[decoder]):
            starts.append(unit.start())
            begun = False
        begun |= is_slice
        units += 1
        pictures += first
        if units > MAX_UNITS or pictures > MAX_PICTURES:
            break
    return units, pictures, starts


class _FrameNumbers:
    """H.264 numbers the pictures that others build on (frame_num: ITU-T H.264, 7.4.3), so that a lost one shows."""

    def __init__(self) -> None:
        self._modulus = 0  # 0: unknown, or a stream that may leave numbers out
        self._last: int | None = None

    def one_is_missing(self, data: bytes) -> bool:
        """Whether a picture that others build on is missing before one of this message, the next of the stream."""
        missing = False
        for unit in _UNIT.finditer(data):
            kind, referred = unit[1][0] & 31, unit[1][0] >> 5 & 3
            bits = _Bits(data[unit.end() + 1 : unit.end() + 64])
            try:
                if kind == 7:
                    self._modulus = _frame_num_modulus(bits)
                elif kind in (1, 5) and self._modulus and not bits.golomb():  # the first slice of a picture
                    bits.golomb(), bits.golomb()  # kind of slice, parameter set
                    number = bits.take((self._modulus - 1).bit_length())
                    if kind == 1 and self._last is not None:
                        missing |= number not in (self._last, (self._last + 1) % self._modulus)
                    if referred:
                        self._last = number
            except ValueError:  # cut short: ffmpeg will say so
                continue
        return missing


def _frame_num_modulus(bits: _Bits) -> int:
    """Up to where a stream counts, from its sequence parameter set (7.3.2.1.1); 0 if it need not, or is exotic."""
    profile = bits.take(24) >> 16
    bits.golomb()
    if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
        if bits.golomb() == 3 and bits.take(1):  # colours in planes of their own
            return 0
        bits.golomb(), bits.golomb(), bits.take(1)
        if bits.take(1):  # matrices
            return 0
    exponent = bits.golomb()
    if exponent > 12:
        raise ValueError
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1), bits.golomb(), bits.golomb()
        for _ in range(bits.golomb()):
            bits.golomb()
    bits.golomb()
    return 0 if bits.take(1) else 16 << exponent  # gaps_in_frame_num_value_allowed_flag


class _Bits:
    """The bits of a unit, from its first on."""

    def __init__(self, unit: bytes) -> None:
        unit = unit.replace(b"\0\0\3", b"\0\0")  # the 3 is there so that nothing looks like a start code
        self._bits, self._left = int.from_bytes(unit, "big"), 8 * len(unit)

    def take(self, count: int) -> int:
        """The next bits as a number. Raises ValueError when there are not so many."""
        self._left -= count
        if self._left < 0:
            raise ValueError
        return self._bits >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """The next number of variable length (Exp-Golomb, 9.1)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)
