"""Decode the frames of an MP4, a MOV, a WebM or a Matroska with FFmpeg's libraries (PyAV).

Importing this module loads FFmpeg, so the gateway's own process never does: only its decoding processes.

First, all packets of the video are read without decoding any. They give the number of frames and their times. Then
each wanted frame is decoded from the keyframe before it, with an empty decoder. So a frame's pixels depend only on the
file and its number. A long clip costs only what lies between the wanted frames and the keyframes before them.
"""

from __future__ import annotations

import gc
import struct
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NoReturn

import av
from av.buffer import Buffer
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image as Pillow

from service.core.errors import InvalidImage, TooLarge
from service.core.vision import IMAGE_SIZE, UInt8Array
from service.media.decoder import squashed
from service.media.video_header import MAX_TRACKS

Container = Literal["mov", "matroska"]  # FFmpeg's names; each reads files of its kind only
CODECS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "mpeg4")  # FFmpeg's decoders of what phones and browsers write
MAX_PACKETS = 36_000  # 10 minutes of 60 pictures a second
PROBE_BYTES = 1_000_000  # read to find what the streams are
UNSPECIFIED = 2  # of FFmpeg's colour spaces
HD_PIXELS = 1280 * 720  # from this size on, players take colours that are not specified as BT.709
ORIENTATIONS = {  # EXIF's by the signs of a display matrix's a, b, c and d; x' = a x + c y, y' = b x + d y
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


@dataclass(frozen=True, slots=True)
class Run:
    """The wanted frames that are decoded from one keyframe on."""

    start: int  # place of its packet
    end: int  # behind the packet of the last wanted frame
    wanted: tuple[int, ...]  # numbers of frames, ascending


class Film:
    """The packets of a file's video, in the order in which they are decoded. The caller closes it."""

    def __init__(self, data: bytes, container: Container, max_pixels: int) -> None:
        """Nothing but the bytes is opened. Raises InvalidImage, TooLarge, and whatever PyAV raises."""
        self._container = av.open(
            BytesIO(data),
            mode="r",
            format=container,
            options={"threads": "1", "max_pixels": str(max_pixels)},
            container_options={
                "codec_whitelist": ",".join(CODECS),
                "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm",
                "protocol_whitelist": "",
                "max_streams": str(MAX_TRACKS),
                "probesize": str(PROBE_BYTES),
                "fpsprobesize": "0",
                "ignore_chapters": "1",
            },
            io_open=_refused,
            metadata_errors="replace",
        )
        try:
            self._stream = _video(list(self._container.streams.video))
            self._converter = VideoReformatter()
            self._codec: VideoCodecContext = self._stream.codec_context
            self._codec.thread_count = 1
            self._codec.options = {"max_pixels": str(max_pixels), "strict": "1"}
            self._reorder_depth = self._codec.reorder_depth
            self._packets = self._read(len(data))
            self._places = self._numbered()
        except BaseException:
            self.close()
            raise
        self._orientation: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as stored; zeros if the file does not say."""
        return self._codec.width, self._codec.height

    @property
    def orientation(self) -> int:
        """EXIF's 1 to 8, of the first frame that was decoded; 1 before."""
        return self._orientation or 1

    @property
    def count(self) -> int:
        return len(self._places)

    def close(self) -> None:
        self._container.close()
        gc.collect()  # in PyAV a frame and its side data refer to each other, and a frame of 4K has 12 MB

    def times_s(self) -> tuple[list[float], float]:
        """Return each frame's time from the first, and the duration with the last frame's. Raises InvalidImage."""
        unit, first = float(self._stream.time_base or 0), self._times[0]
        times_s = [(time - first) * unit for time in self._times]
        if self.count > 1 and not times_s[-1] > 0:
            raise InvalidImage("the video's frames have no times: save it anew with an editor", param="video")
        last = self._packets[self._places[-1]].duration or 0
        mean = times_s[-1] / (self.count - 1) if self.count > 1 else 0.0
        return times_s, times_s[-1] + (last * unit if last > 0 else mean)

    def runs(self, wanted: Sequence[int]) -> list[Run]:
        """Group the wanted frames, whose numbers ascend, by the keyframe that each is decoded from."""
        keys = [place for place, packet in enumerate(self._packets) if packet.is_keyframe]
        numbers = {place: number for number, place in enumerate(self._places)}
        starts: dict[int, list[int]] = defaultdict(list)
        for number in wanted:
            # A picture that is shown before the keyframe that precedes it in the file needs the keyframe before that.
            nearest = bisect_right(keys, self._places[number]) - 1
            while nearest >= 0 and numbers.get(keys[nearest], -1) > number:
                nearest -= 1
            starts[keys[nearest] if nearest >= 0 else 0].append(number)
        return [
            Run(start, 1 + max(self._places[number] for number in each), tuple(each)) for start, each in starts.items()
        ]

    def frames(self, run: Run) -> Iterator[tuple[int, UInt8Array]]:
        """Decode the wanted frames of a run to [3, 224, 224] RGB, upright.

        If the decoder does not show a frame, the next picture that it shows takes its place. Raises InvalidImage.
        """
        waiting = deque(run.wanted)
        last: VideoFrame | None = None
        for frame in self._decoded(run.start):
            if frame.is_corrupt:
                raise ValueError("a damaged frame")
            if frame.pts is None:
                continue
            last = frame
            if waiting[0] <= frame.pts:
                pixels = self._seen(frame)
                while waiting and waiting[0] <= frame.pts:
                    yield waiting.popleft(), pixels
                if not waiting:
                    return
        if last is None:
            raise ValueError("no frame")
        pixels = self._seen(last)
        for number in waiting:
            yield number, pixels

    def _decoded(self, start: int) -> Iterator[VideoFrame]:
        if self._codec.is_open:
            self._codec.flush_buffers()
        self._codec.reorder_depth = self._reorder_depth
        for packet in self._packets[start:]:
            yield from self._codec.decode(packet)
        yield from self._codec.decode(None)

    def _seen(self, frame: VideoFrame) -> UInt8Array:
        """Its sample aspect ratio is of no account: what is squashed to a square has none."""
        if self._orientation is None:
            self._orientation = _orientation(frame)
        is_hd = frame.colorspace == UNSPECIFIED and frame.width * frame.height >= HD_PIXELS
        colours = self._converter.reformat(
            frame,
            format="rgb24",
            interpolation=Interpolation.BICUBIC,
            src_colorspace=Colorspace.ITU709 if is_hd else None,
            threads=1,
        ).to_ndarray()
        return squashed(Pillow.fromarray(colours), IMAGE_SIZE, self.orientation)

    def _read(self, nbytes: int) -> list[Packet[VideoStream]]:
        for stream in self._container.streams:
            if stream.index != self._stream.index:
                stream.discard = "all"  # type: ignore[assignment]
        packets: list[Packet[VideoStream]] = []
        total = 0
        for packet in self._container.demux(self._stream):
            if packet.size == 0:  # the last, which flushes a decoder
                continue
            if packet.is_corrupt:
                raise ValueError("a packet is cut short")
            packets.append(packet)
            total += packet.size
            if len(packets) > MAX_PACKETS:
                raise TooLarge(f"the video has more than {MAX_PACKETS:,} pictures: cut it", param="video")
            if total > 2 * nbytes:
                raise InvalidImage(
                    "the video's pictures share their bytes, which is not read: save it anew with an editor",
                    param="video",
                )
        return packets

    def _numbered(self) -> list[int]:
        """Number the frames by their times: the place of each one's packet. A packet's time becomes its number."""
        shown = [place for place, packet in enumerate(self._packets) if self._is_shown(packet)]
        if not shown:
            raise ValueError("no frames")
        told: dict[int, int] = {}
        for place in shown:
            packet = self._packets[place]
            time = packet.dts if packet.pts is None else packet.pts
            told[place] = place if time is None else time
        places = sorted(shown, key=lambda place: (told[place], place))
        self._times = [told[place] for place in places]
        for packet in self._packets:
            packet.pts = packet.dts = None
        for number, place in enumerate(places):
            self._packets[place].pts = number
        return places

    def _is_shown(self, packet: Packet[VideoStream]) -> bool:
        """A file may cut off its own beginning or end, and VP8 has pictures that only others are made from."""
        if packet.is_discard:
            return False
        return self._codec.name != "vp8" or bool(bytes(packet)[0] & 0x10)


def _refused(_url: str, _flags: int, _options: object) -> NoReturn:
    raise PermissionError("a video opens no other file")


def _video(streams: list[VideoStream]) -> VideoStream:
    """The first that is no cover picture. Raises InvalidImage."""
    films = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    if not films:
        raise InvalidImage("the file has no video in it: send one that has pictures", param="video")
    if films[0].codec_context is None or films[0].codec_context.name not in CODECS:
        name = "unknown" if films[0].codec_context is None else films[0].codec_context.name
        raise InvalidImage(
            f"the video's codec ({name}) is not read: save it as H.264, H.265, VP8, VP9, AV1 or MPEG-4", param="video"
        )
    return films[0]


def _orientation(frame: VideoFrame) -> int:
    """EXIF's 1 to 8 of the display matrix, by which phones turn a video; the nearest quarter turn."""
    told = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(told, Buffer):
        return 1
    raw = bytes(told)
    (a, b), (c, d) = struct.unpack_from("<2i", raw, 0), struct.unpack_from("<2i", raw, 12)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        b = c = 0
    else:
        a = d = 0
    signs = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
    return ORIENTATIONS.get(signs, 1)
