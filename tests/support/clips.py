"""Clips for the tests of media: a yellow square goes from left to right over blue, one step a frame."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO

import av
import numpy as np
from PIL import Image as Pillow

from benchmarks.bombs import webp_chunk
from benchmarks.fuzz.films import usual_scheduling

YELLOW, BLUE = (250, 220, 10), (40, 80, 120)
HOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl")


def scene(index: int, count: int, width: int = 320, height: int = 240) -> Pillow.Image:
    """Picture `index` of `count`: the square is a sixth as wide as the picture."""
    picture = Pillow.new("RGB", (width, height), BLUE)
    side = width // 6
    left = index * (width - side) // max(count - 1, 1)
    picture.paste(YELLOW, (left, height // 3, left + side, height // 3 + side))
    return picture


def square_at(pixels: np.ndarray) -> tuple[float, float]:
    """Where the yellow square's middle is in [3, 224, 224]: from 0 to 1 across and down."""
    down, across = ((pixels[0] > 180) & (pixels[2] < 90)).nonzero()
    return float(across.mean()) / 223, float(down.mean()) / 223


def expected_at(index: int, count: int) -> float:
    """Where the square's middle is across, from 0 to 1."""
    return (1 / 12) + index / max(count - 1, 1) * (5 / 6)


def film(
    codec: str = "libx264",
    container: str = "mp4",
    count: int = 30,
    size: tuple[int, int] = (320, 240),
    rate: int = 30,
    options: Mapping[str, str] | None = None,
    turned: float = 0,
    flipped: bool = False,
    container_options: Mapping[str, str] | None = None,
    pix_fmt: str = "yuv420p",
) -> bytes:
    """Encode `count` scenes. `turned` is in degrees to the left, as FFmpeg's display matrix takes it."""
    file = BytesIO()
    with usual_scheduling(), av.open(file, "w", format=container, options=dict(container_options or {})) as out:
        stream = out.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if turned or flipped:
            stream.set_display_rotation(turned, hflip=flipped)
        for index in range(count):
            frame = av.VideoFrame.from_image(scene(index, count, *size))
            frame.pts = index
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def sound(container: str = "mp4") -> bytes:
    """A file with nothing but a tenth of a second of sound."""
    file = BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("aac" if container == "mp4" else "libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        frame.sample_rate = 48_000
        frame.pts = 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def repeated(count: int, *, keyframes: bool, streams: int = 1) -> bytes:
    """An MP4 whose second picture is repeated, so that there are `count` more than the first."""
    with av.open(BytesIO(film("mpeg4", count=3, size=(16, 16)))) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        file = BytesIO()
        with av.open(file, "w", format="mp4") as out:
            made = [out.add_stream_from_template(source.streams.video[0]) for _ in range(streams)]
            for stream in made:
                for number in range(count + 1):
                    old = packets[0 if number == 0 else 1]
                    packet = av.Packet(bytes(old))
                    packet.stream, packet.time_base = stream, old.time_base
                    packet.is_keyframe = keyframes or number == 0
                    packet.pts = packet.dts = 512 * number
                    out.mux_one(packet)
    return file.getvalue()


def changed(data: bytes, changes: Mapping[bytes, Callable[[bytes], bytes]]) -> bytes:
    """Rebuild an MP4 with the contents of some boxes changed. `moov` is its last box, so no offset changes."""
    parts, offset = [], 0
    while offset < len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        content = data[offset + 8 : offset + size]
        if kind in changes:
            content = changes[kind](content)
        elif kind in HOLDERS:
            content = changed(content, changes)
        parts.append(struct.pack(">I4s", 8 + len(content), kind) + content)
        offset += size
    return b"".join(parts)


def header_first(data: bytes) -> bytes:
    """An MP4 whose header is before its pictures, as for the web."""
    at, pictures = data.index(b"moov") - 4, data.index(b"mdat") - 4
    header = data[at:]

    def later(stco: bytes) -> bytes:
        return stco[:8] + struct.pack(">I", struct.unpack_from(">I", stco, 8)[0] + len(header))

    return data[:pictures] + changed(header, {b"stco": later}) + data[pictures:at]


def animation(
    kind: str, pictures: Sequence[Pillow.Image], duration_ms: int | list[int] = 100, **options: object
) -> bytes:
    file = BytesIO()
    more = {"lossless": True} if kind == "WEBP" else {}
    pictures[0].save(
        file, kind, save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0, **more, **options
    )
    return file.getvalue()


def gif(width: int, height: int, *frames: tuple[int, int, int, int, int, int]) -> bytes:
    """A GIF of frames of one colour: 0 black, 1 red, 2 green, 3 blue. Each: colour, left, top, width, height, disposal.

    Codes of 8 bits that are reset in time are pixels without compression.
    """
    palette = bytes((0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255)).ljust(3 * 128, b"\x80")
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0xF6, 3, 0), palette]
    for colour, left, top, across, down, disposal in frames:
        pixels = bytes([colour]) * (across * down)
        codes = b"".join(b"\x80" + pixels[at : at + 100] for at in range(0, len(pixels), 100)) + b"\x81"
        blocks = (codes[at : at + 255] for at in range(0, len(codes), 255))
        parts += [
            b"!\xf9\4" + struct.pack("<BHBB", disposal << 2, 10, 0, 0),
            struct.pack("<BHHHHBB", 0x2C, left, top, across, down, 0, 7),
            *(bytes([len(block)]) + block for block in blocks),
            b"\0",
        ]
    return b"".join([*parts, b";"])


def webp_in_part(width: int, height: int, left: int, top: int, colour: tuple[int, int, int]) -> bytes:
    """An animated WebP without alpha, whose one frame of 20x20 pixels leaves the rest of its canvas free."""
    still = BytesIO()
    Pillow.new("RGB", (20, 20), colour).save(still, "WEBP", lossless=True)

    def three(*numbers: int) -> bytes:
        return b"".join(number.to_bytes(3, "little") for number in numbers)

    frame = three(left // 2, top // 2, 19, 19, 100) + b"\0" + still.getvalue()[12:]
    body = (
        webp_chunk(b"VP8X", b"\2\0\0\0" + three(width - 1, height - 1))
        + webp_chunk(b"ANIM", bytes(6))
        + webp_chunk(b"ANMF", frame)
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def many_gif_frames(count: int, width: int, height: int) -> bytes:
    """A GIF of a large canvas on which one small picture is drawn `count` times."""
    small = animation("GIF", [scene(0, 1, 8, 8)])
    start = small.index(b",\0\0\0\0")
    end = small.index(b"\0;", start) + 1
    head = bytearray(small[:start])
    head[6:10] = struct.pack("<HH", width, height)
    return bytes(head) + small[start:end] * count + b";"
