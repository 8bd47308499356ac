"""The page with a video: a real Chromium shows its frames. Most answers are this file's own, so that they are known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.async_api import Route

from tests.service.edges.web.conftest import Visit, text_of
from tests.service.edges.web.test_page import DROP
from tests.support import clips, films
from tests.support.fakes import png

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

ID = "img_" + "1" * 32
COUNT = 10
# Where the red square stands in each canvas, as a share of the width.
PLACES = """(canvases) => canvases.map((canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, canvas.height / 2, canvas.width, 1);
    const red = [...Array(canvas.width).keys()].filter((x) => data[4 * x] > 150 && data[4 * x + 1] < 120);
    return red.reduce((sum, x) => sum + x, 0) / red.length / canvas.width;
})"""


def relevance_at(index: int) -> dict[str, Any]:
    """High in one column, further right for each frame."""
    grid = [[1.0 if column == index else 0.0 for column in range(16)] for _ in range(16)]
    tensions = {"particularize": 0.5, "explore": 0.9, "diversify": 0.1}
    return {"map": grid, "levels": [[0] * 8] * 8, "tensions": tensions, "area": [0, 0, 1, 1]}


def answer(indices: list[int]) -> str:
    """The events of a service that looked at these frames."""
    frames = [{"index": i, "time_s": i / films.FRAMES_PER_S, "relevance": relevance_at(i)} for i in indices]
    vision = {"cache": "miss", "vision_tokens": 256, "visual_tokens": 64, "detail": "low", "reduced": False}
    timing = {"queue": 0.1, "load": 1.0, "vision": 2.0, "first_token": 3.0, "total": 4.0}
    end = {"finish_reason": "stop", "vision": vision | {"fit": "squash", "frames": frames}, "timing_ms": timing}
    events = [{"delta": "to the right"}, end | {"relevance": []}]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


async def answered(visit: Visit, indices: list[int]) -> None:
    """Answer the page in place of the service."""

    async def keep(route: Route) -> None:
        kept = {"id": ID, "bytes": 1, "width": 112, "height": 112, "expires_at": 4e9}
        await route.fulfill(json=kept)

    async def say(route: Route) -> None:
        await route.fulfill(body=answer(indices), content_type="text/event-stream")

    await visit.page.route("**/v1/images", keep)
    await visit.page.route("**/v1/vqa", say)


async def take(visit: Visit, content: bytes, name: str = "photo.png") -> None:
    """Choose a file, and wait until the page has read it."""
    await visit.choose(content, name)
    await visit.page.wait_for_selector(f"#stage canvas[aria-label^='{name}']")


@pytest.mark.parametrize(("name", "way"), [("clip.webm", "drop"), ("clip.webm", "choose"), ("clip.mp4", "choose")])
async def test_the_frames_that_were_looked_at_are_a_strip(visit: Visit, name: str, way: str) -> None:
    film = films.video(COUNT, "mp4" if name.endswith("mp4") else "webm")
    indices = [0, 3, 6, 9]
    await answered(visit, indices)
    if way == "drop":
        await visit.page.evaluate(DROP, [name, text_of(film), way])
        await visit.page.wait_for_selector(f"#stage canvas[aria-label^='{name}']")
    else:
        await take(visit, film, name)
    assert await visit.page.locator("#stage canvas").count() == 1
    await visit.ask("which way does the square move?")
    assert await visit.answers() == ["to the right"]
    (asked,) = visit.posted("/v1/vqa")
    assert (asked.post_data_json["video"], "image" in asked.post_data_json) == (ID, False)
    captions = await visit.page.locator("#stage figcaption").all_inner_texts()
    assert captions == [f"frame {i}, {i / 5:.2f} s" for i in indices]
    await visit.page.locator("#views label", has_text="Image").click()
    shown = await visit.page.locator("#stage canvas").evaluate_all(PLACES)
    assert shown == pytest.approx([(16 + i * 80 / 9) / 112 for i in indices], abs=0.03)


async def test_a_service_keeps_the_video_and_is_asked_by_its_id(visit: Visit) -> None:
    await take(visit, films.video(2), "clip.webm")
    for question in ("which way?", "how fast?"):
        await visit.ask(question)
        assert await visit.answers() == ["a red square"]
    assert len(visit.posted("/v1/images")) == 1
    captions = await visit.page.locator("#stage figcaption").all_inner_texts()
    assert captions == ["frame 0, 0.00 s", "frame 1, 0.20 s"]
    assert "features from the cache" in await visit.page.locator(".facts").first.inner_text()


async def test_each_frame_has_its_own_map_and_no_scores(visit: Visit) -> None:
    await answered(visit, [0, 15])
    await take(visit, films.video(16), "clip.webm")
    await visit.ask("which way?")
    await visit.answers()
    labels = [await each.get_attribute("aria-label") for each in await visit.page.locator("#stage canvas").all()]
    assert "Most relevant: top left." in (labels[0] or "")
    assert "Most relevant: top right." in (labels[1] or "")
    offered = await visit.page.locator("#views label:visible").all_inner_texts()
    assert offered == ["Image", "Relevance", "Levels"]
    assert "2 frames" in await visit.page.inner_text(".facts")
    assert "2 frames looked at." in await visit.page.inner_text("#caption")
    await visit.page.click(".run details:has(.tensions) summary")
    assert "0.90: looks around, too" in await visit.page.inner_text(".tensions")
    await visit.page.click(".code summary")
    assert "-F 'video=@\"clip.webm\"'" in await visit.page.inner_text(".code code")


async def test_an_image_after_a_video_has_all_its_views_again(visit: Visit) -> None:
    await answered(visit, [0, 5])
    await take(visit, films.video(6), "clip.webm")
    await visit.ask("which way?")
    await visit.answers()
    await visit.page.unroute("**/v1/images")
    await visit.page.unroute("**/v1/vqa")
    await take(visit, png())
    await visit.ask("what is there?")
    assert await visit.answers() == ["a red square"]
    assert await visit.page.locator("#views label:visible").count() == 6
    assert await visit.page.locator("#stage.strip").count() == 0
    await visit.page.get_by_text("Show on the frames").click()  # the video's
    assert await visit.page.locator("#stage.strip canvas").count() == 2


async def test_two_settings_of_a_video_differ_by_their_tokens_only(visit: Visit) -> None:
    await visit.page.click("#settings summary")
    await visit.page.check("#compare")
    assert await visit.page.locator("#detail-b").input_value() == "high"
    await take(visit, films.video(2), "clip.webm")
    for name in ("detail", "fit"):
        assert await visit.page.locator(f"#{name}-a, #{name}-b").evaluate_all("(all) => all.every((s) => s.disabled)")
    assert (
        await visit.page.locator("#why-not-b").inner_text() == "Frames of a video are seen at detail low, and squashed."
    )
    await visit.ask("which way?")
    assert await visit.answers() == ["a red square", "a red square"]
    first, second = (each.post_data_json for each in visit.posted("/v1/vqa"))
    assert ("detail" in first, "detail" in second, "budget" in first) == (False, False, False)
    assert second["budget"] == {"vision_tokens": [64, 64]}
    await take(visit, png())
    assert await visit.page.locator("#detail-b").is_enabled()


SEEK = "Object.defineProperty(HTMLMediaElement.prototype, 'currentTime', { set() { %s } })"


async def test_an_answer_stays_if_its_frames_cannot_be_shown(visit: Visit) -> None:
    await answered(visit, [0, 5])
    await take(visit, films.video(6), "clip.webm")
    await visit.page.evaluate(SEEK % "this.dispatchEvent(new Event('error'))")
    await visit.ask("which way?")
    assert await visit.answers() == ["to the right"]
    assert "This browser cannot show the frames of this video." in await visit.page.inner_text(".run")
    assert "2 frames" in await visit.page.inner_text(".facts")
    assert await visit.page.locator("#trouble strong").count() == 0


async def test_stop_ends_the_search_for_frames(visit: Visit) -> None:
    await answered(visit, [0, 5])
    await take(visit, films.video(6), "clip.webm")
    await visit.page.evaluate(SEEK % "")
    await visit.ask("which way?")
    await visit.page.wait_for_selector(".facts")
    await visit.page.click("#stop")
    assert await visit.answers() == ["to the right"]
    assert "Stopped before its frames were shown." in await visit.page.inner_text(".run")


async def test_a_video_is_freed_once_no_answer_shows_it(visit: Visit) -> None:
    await visit.page.evaluate(
        "() => { const revoke = URL.revokeObjectURL; window.freed = [];"
        " URL.revokeObjectURL = (url) => { window.freed.push(url); revoke.call(URL, url); }; }"
    )
    for name, question in (("first.webm", None), ("second.webm", "which way?"), ("third.webm", None)):
        await take(visit, films.video(2), name)
        if question:
            await visit.ask(question)
            await visit.answers()
    assert len(await visit.page.evaluate("window.freed")) == 1  # the first: the second's answer can be shown again
    await visit.page.get_by_text("Show on the frames").click()
    assert await visit.page.locator("#stage canvas").count() == 2


async def test_bitmaps_are_kept_no_larger_than_the_page_needs(visit: Visit) -> None:
    await visit.page.evaluate(
        "() => { const draw = CanvasRenderingContext2D.prototype.drawImage; window.drawn = [];"
        " CanvasRenderingContext2D.prototype.drawImage = function (of, ...at) {"
        " window.drawn.push([of.width, of.height]); draw.call(this, of, ...at); }; }"
    )
    for content, name in ((clips.film(count=2, size=(1280, 720)), "clip.mp4"), (png(size=(1920, 1080)), "large.png")):
        await take(visit, content, name)
        assert (await visit.page.evaluate("window.drawn"))[-1] == [896, 504]


async def test_a_file_that_is_no_video_is_told(visit: Visit) -> None:
    await visit.choose(films.video()[:40], "clip.webm")
    await visit.page.wait_for_selector("#trouble strong")
    assert "clip.webm is not an image or a video that this page can show" in await visit.page.inner_text("#trouble")
