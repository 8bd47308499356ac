"""Decoding happens in processes that an image can end, and the service never with them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bombs
from service.core.errors import InvalidImage, TooLarge, Unavailable
from service.core.viewport import Viewport
from service.media.clip import decode_clip
from service.media.decoder import ImageLimits, decode
from service.media.workers import DecodingWorkers
from tests.support.clips import animation, film, many_gif_frames, scene
from tests.support.fakes import until
from tests.support.paths import PROJECT
from tests.support.pictures import LIMITS, encoded, picture

pytestmark = pytest.mark.slow  # together: every test starts processes

SMALL = encoded(picture(300, 200), "JPEG")
SERVED = ImageLimits()
MP4 = film()


@cache
def large() -> bytes:
    return bombs.png(6000, 6000, depth=8, colours=6)


@asynccontextmanager
async def workers(
    limits: ImageLimits = LIMITS,
    count: int = 1,
    cpu_s: float = 20,
    wall_s: float = 60,
    memory_bytes: int | None = None,
) -> AsyncIterator[DecodingWorkers]:
    found = DecodingWorkers(limits, count, cpu_s, wall_s, memory_bytes)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
async def one() -> AsyncIterator[DecodingWorkers]:
    async with workers() as found:
        yield found


def is_running(pid: int) -> bool:
    """A process that ended and was not waited for is not running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")


def minor_faults(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def shared_memories() -> int:
    """How many of the workers' memories this process has."""
    return sum("glimpse-decode" in link for link in map(read_link, Path("/proc/self/fd").iterdir())) + Path(
        "/proc/self/maps"
    ).read_text().count("glimpse-decode")


HIDES_EXTRAS = """
import importlib.util
import sys

EXTRAS = ("av", "pypdfium2")
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name in EXTRAS else find_spec(name, *package)
sys.modules |= dict.fromkeys(EXTRAS)  # an import raises ModuleNotFoundError
"""


async def test_a_worker_decodes_without_the_extras(tmp_path, monkeypatch):
    """As in the gateway's image, which has no PyAV."""
    (tmp_path / "sitecustomize.py").write_text(HIDES_EXTRAS)
    monkeypatch.syspath_prepend(tmp_path)  # a decoding process gets the path of this one
    async with workers() as bare:
        assert (await bare.decode(SMALL, (224,))).width == 300
        assert len((await bare.decode_clip(animation("GIF", [scene(n, 6) for n in range(6)]), 4)).frames) == 4
        with pytest.raises(InvalidImage, match=r"'\.\[video\]'"):
            await bare.decode_clip(MP4, 4)
        with pytest.raises(InvalidImage, match=r"'\.\[pdf\]'"):
            await bare.decode(b"%PDF-1.4 x", (224,))


@pytest.mark.parametrize("views", [(224,), (448,), (224, 448), (448, 224)])
async def test_a_worker_sees_what_the_decoder_sees(one, views):
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        data = encoded(picture(500, 300), kind)
        found, expected = await one.decode(data, views), decode(data, LIMITS, views)
        assert (found.width, found.height) == (500, 300)
        assert list(found.views) == list(expected.views)
        for size in views:
            assert np.array_equal(found.views[size], expected.views[size])
            assert found.views[size].flags.owndata


@pytest.mark.parametrize("viewport", [Viewport.around(500, 300, (1, 2, 3)), Viewport(100, 0, 300, 500, 300, (1, 2, 3))])
async def test_a_worker_sees_the_same_square(one, viewport):
    data = encoded(picture(500, 300))
    found, expected = await one.decode(data, (224, 448), viewport), decode(data, LIMITS, (224, 448), viewport)
    assert all(np.array_equal(found.views[size], expected.views[size]) for size in (224, 448))


async def test_pixels_stay_when_the_next_image_comes(one):
    first = await one.decode(SMALL, (224,))
    kept = first.pixels.copy()
    await one.decode(encoded(picture(30, 20)), (224,))
    assert np.array_equal(first.pixels, kept)


async def test_an_image_of_several_megabytes_goes_through_whole(one):
    rng = np.random.default_rng(1)
    data = encoded(bombs.Pillow.fromarray(rng.integers(0, 255, (800, 800, 3), np.uint8)))
    assert len(data) > 1_900_000
    assert np.array_equal((await one.decode(data, (224,))).pixels, decode(data, LIMITS).pixels)
    assert np.array_equal((await one.decode(data, (448,))).views[448], decode(data, LIMITS, (448,)).views[448])


@pytest.mark.parametrize(
    "data", [b"", b"no image", SMALL[:500], bytes(2_000_001), bombs.png(4001, 1000, depth=8, colours=2)]
)
async def test_a_worker_refuses_what_the_decoder_refuses_and_goes_on(one, data):
    with pytest.raises((InvalidImage, TooLarge)) as expected:
        decode(data, LIMITS)
    one.start()
    before = one.pids
    with pytest.raises(type(expected.value)) as caught:
        await one.decode(data, (224,))
    assert (caught.value.message, caught.value.param) == (expected.value.message, "image")
    assert (await one.decode(SMALL, (224,))).width == 300
    assert one.pids == before


async def test_an_image_that_takes_too_much_cpu_time_is_refused_and_another_worker_goes_on():
    async with workers(SERVED, cpu_s=0.05) as found:
        found.start()
        (before,) = found.pids
        with pytest.raises(TooLarge, match=r"more than 0\.05 s of CPU time: send it smaller"):
            await found.decode(large(), (224,))
        assert not is_running(before)
        assert (await found.decode(SMALL, (224,))).width == 300


async def test_a_busy_worker_keeps_its_memory_and_an_idle_one_gives_it_back():
    data = bombs.png(5000, 4000, depth=8, colours=2)
    async with workers(SERVED) as found:
        await found.decode(data, (224,))
        (pid,) = found.pids
        before = minor_faults(pid)
        for _ in range(3):
            await found.decode(data, (224,))
        assert minor_faults(pid) - before < 1000  # 20,000 an image if all its pages are fresh
        held = resident_mb(pid)
        await until(lambda: resident_mb(pid) < held - 30)


async def test_a_worker_gives_back_at_once_what_a_very_large_image_took():
    async with workers(SERVED) as found:
        await found.decode(SMALL, (224,))
        (pid,) = found.pids
        before = resident_mb(pid)
        await found.decode(bombs.png(7000, 7000, depth=8, colours=2), (224,))  # 147 MB of pixels
        await found.decode(SMALL, (224,))
        assert resident_mb(pid) < before + 100


async def test_cpu_time_is_counted_for_each_image_by_itself():
    async with workers(SERVED, cpu_s=1.0) as found:
        image = bombs.png(2000, 2000, depth=8, colours=6)
        for _ in range(12):
            await found.decode(image, (224,))
        assert cpu_s(*found.pids) > 1.0


async def test_a_worker_that_stands_still_is_ended_and_its_image_refused():
    async with workers(wall_s=0.5) as found:
        await found.decode(SMALL, (224,))
        (before,) = found.pids
        os.kill(before, signal.SIGSTOP)
        with pytest.raises(TooLarge, match=r"more than 0\.5 s"):
            await found.decode(SMALL, (224,))
        assert not is_running(before)


async def test_an_image_that_takes_too_much_memory_is_refused():
    async with workers(SERVED, memory_bytes=150_000_000) as found:
        with pytest.raises(TooLarge, match="too much memory: send it smaller"):
            await found.decode(bombs.png(7000, 7000, depth=8, colours=6), (224,))
        assert (await found.decode(SMALL, (224,))).width == 300


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_an_idle_worker_that_is_ended_is_replaced_at_once_and_nobody_notices(one, number):
    await one.decode(SMALL, (224,))
    (before,) = one.pids
    os.kill(before, number)
    await until(lambda: one.pids != [before])
    assert not is_running(before)
    assert (await one.decode(SMALL, (224,))).width == 300


async def test_an_image_whose_worker_is_ended_from_outside_is_decoded_by_another(one):
    await one.decode(SMALL, (224,))
    (before,) = one.pids
    os.kill(before, signal.SIGSTOP)
    job = asyncio.create_task(one.decode(SMALL, (224,)))
    await asyncio.sleep(0)
    os.kill(before, signal.SIGKILL)
    assert (await job).width == 300


async def test_a_caller_that_leaves_does_not_end_the_worker(one):
    await one.decode(SMALL, (224,))
    before = one.pids
    job = asyncio.create_task(one.decode(SMALL, (224,)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    job.cancel()
    with suppress(asyncio.CancelledError):
        await job
    assert (await one.decode(encoded(picture(40, 30)), (224,))).width == 40
    assert one.pids == before


async def test_a_caller_that_leaves_while_it_waits_for_a_worker_is_not_decoded(one):
    work = await one.begin_decode(SMALL, (224,))
    waiting = asyncio.create_task(one.begin_decode(SMALL, (224,)))
    await asyncio.sleep(0)
    waiting.cancel()
    assert (await work).width == 300
    await asyncio.sleep(0)
    assert waiting.cancelled()
    assert one._free.qsize() == 1


async def test_many_images_share_few_workers():
    async with workers(count=2) as found:
        images = [encoded(picture(10 + number, 9)) for number in range(20)]
        decoded = await asyncio.gather(*(found.decode(image, (224,)) for image in images))
        assert [each.width for each in decoded] == list(range(10, 30))
        assert len(found.pids) == 2


async def test_a_decoder_that_does_not_start_is_a_fault_of_the_service():
    async with workers(memory_bytes=0) as found:
        with pytest.raises(Unavailable, match="does not start"):
            await found.decode(SMALL, (224,))


async def test_closing_ends_workers_that_decode_and_leaves_nothing():
    async with workers(SERVED, count=2) as found:
        found.start()
        pids = found.pids
        jobs = [asyncio.create_task(found.decode(large(), (224,))) for _ in range(5)]
        await until(lambda: all(worker.is_started for worker in found._workers))
        assert shared_memories() > 0
        found.close()
        assert not any(map(is_running, pids))
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
    assert shared_memories() == 0


@pytest.mark.parametrize("most", [1, 8, 32])
async def test_a_worker_sees_a_clips_frames_as_the_decoder_does(one, most):
    for data in (
        film(count=40),
        film("libvpx", "webm", count=12),
        animation("GIF", [scene(each, 40) for each in range(40)]),
    ):
        found, expected = await one.decode_clip(data, most), decode_clip(data, LIMITS, most)
        assert (found.width, found.height, found.duration_s) == (320, 240, expected.duration_s)
        assert (found.count, found.times_s) == (expected.count, expected.times_s)
        assert len(found.frames) == min(most, 12 if data.startswith(b"\x1a") else 40)
        for ours, theirs in zip(found.frames, expected.frames, strict=True):
            assert (ours.index, ours.time_s) == (theirs.index, theirs.time_s)
            assert np.array_equal(ours.pixels, theirs.pixels)
            assert ours.pixels.flags.owndata
    assert (await one.decode(SMALL, (224,))).width == 300


@pytest.mark.parametrize("data", [b"", b"no video", bytes(2_000_001), many_gif_frames(2, 3000, 3000)])
async def test_a_worker_refuses_the_clips_that_the_decoder_refuses_and_goes_on(one, data):
    with pytest.raises((InvalidImage, TooLarge)) as expected:
        decode_clip(data, LIMITS, 8)
    one.start()
    before = one.pids
    with pytest.raises(type(expected.value)) as caught:
        await one.decode_clip(data, 8)
    assert (caught.value.message, caught.value.param) == (expected.value.message, "video")
    assert one.pids == before


async def test_slow_clips_leave_a_worker_to_images():
    async with workers(count=2) as found:
        await found.decode(SMALL, (224,))
        os.kill(found.pids[1], signal.SIGSTOP)  # the next one to work
        first = asyncio.create_task(found.decode_clip(MP4, 2))
        await asyncio.sleep(0)
        second, left = (asyncio.create_task(found.decode_clip(MP4, 2)) for _ in range(2))
        await asyncio.sleep(0)
        assert (await found.decode(SMALL, (224,))).width == 300
        first.cancel()  # its worker is not free before it is done
        left.cancel()
        assert (await found.decode(SMALL, (224,))).width == 300
        assert not second.done()
        os.kill(found.pids[1], signal.SIGCONT)
        assert len((await second).frames) == 2
        clips = await asyncio.gather(*(found.decode_clip(MP4, 2) for _ in range(4)))  # all turns are back
        assert [len(clip.frames) for clip in clips] == [2] * 4
    async with workers(count=1) as found:
        assert len((await found.decode_clip(MP4, 2)).frames) == 2


async def test_a_clip_may_take_the_cpu_time_of_four_images_and_no_more():
    async with workers(SERVED, cpu_s=0.05) as found:
        found.start()
        (before,) = found.pids
        with pytest.raises(TooLarge, match=r"more than 0\.2 s of CPU time: send it shorter or smaller") as caught:
            await found.decode_clip(many_gif_frames(150, 4000, 2000), 32)
        assert caught.value.param == "video"
        assert not is_running(before)
        assert len((await found.decode_clip(film(count=5), 32)).frames) == 5


async def test_a_clip_that_takes_too_much_memory_is_refused():
    data = film(count=2, size=(3840, 2160), options={"preset": "ultrafast"})
    async with workers(SERVED, memory_bytes=60_000_000) as found:
        with pytest.raises((TooLarge, InvalidImage)):
            await found.decode_clip(data, 2)
        assert (await found.decode(SMALL, (224,))).width == 300


async def test_the_memory_of_a_clips_frames_is_free_for_the_next_clip():
    data = film(count=16, size=(1920, 1080), options={"preset": "ultrafast"})
    async with workers(SERVED) as found:
        await found.decode_clip(data, 16)
        (pid,) = found.pids
        held = resident_mb(pid)
        for _ in range(3):
            await found.decode_clip(data, 16)
        assert resident_mb(pid) < held + 40  # all frames would be 150


def read_link(path: Path) -> str:
    with suppress(FileNotFoundError):
        return os.readlink(path)
    return ""


GATEWAY = """
import asyncio, sys
from service.media.decoder import ImageLimits
from service.media.workers import DecodingWorkers
from benchmarks import bombs

async def main():
    workers = DecodingWorkers(ImageLimits(), 2, 60.0)
    workers.start()
    image = bombs.png(6000, 6000, depth=8, colours=6)
    jobs = [asyncio.create_task(workers.decode(image, (224,))) for _ in range(40)]
    await jobs[0]
    print(*workers.pids, flush=True)
    await asyncio.gather(*jobs)

asyncio.run(main())
"""


async def test_no_worker_outlives_a_gateway_that_is_killed():
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, cwd=PROJECT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert gateway.stdout is not None
        pids = list(map(int, (await gateway.stdout.readline()).split()))
        assert len(pids) == 2
        assert all(map(is_running, pids))
    finally:
        gateway.kill()
        await gateway.wait()
    await until(lambda: not any(map(is_running, pids)))
