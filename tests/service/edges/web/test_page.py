"""The page in a real Chromium, on a service without Triton: asking, errors, narrow screens, keyboard."""

from __future__ import annotations

import asyncio
import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image as Pillow
from playwright.async_api import Browser

from service.core.errors import Overloaded, Unavailable
from service.media.store import ImageStore
from tests.service.edges.web.conftest import BYTES, COMMANDS, Kept, Open, Visit, kept, text_of
from tests.support.fakes import png, until
from tests.support.keys import Keys

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

PHONE = {"viewport": {"width": 320, "height": 640}, "is_mobile": True, "has_touch": True}
TROUBLE = "#trouble strong"
DROP = """([name, text, kind]) => {
    const data = new DataTransfer();
    data.items.add(new File([BYTES], name));
    const event = kind === "drop" ? new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true })
        : new ClipboardEvent(kind, { clipboardData: data, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}""".replace("BYTES", BYTES)


def icon() -> bytes:
    """An image that browsers show and the service refuses."""
    out = BytesIO()
    Pillow.new("RGB", (16, 16)).save(out, "ICO")
    return out.getvalue()


async def test_an_answer_comes_and_the_picture_changes(visit: Visit):
    await visit.choose(png())
    before = await visit.picture()
    await visit.ask("what is there?")
    assert await visit.answers() == ["a red square"]
    assert await visit.picture() != before
    assert "Answer: a red square." in await visit.page.inner_text("#said")
    assert await visit.page.inner_text("#answers h3") == "what is there?"


async def test_the_text_is_shown_while_it_comes_and_can_be_stopped(visit: Visit, service: Kept):
    language = service.house.language
    language.gate.clear()
    language.wait_at = 2  # tokens: "a" and " red"
    await visit.choose(png())
    await visit.ask("what is there?")
    answer = visit.page.locator("#answers .answer[aria-busy=true]")
    await answer.filter(has_text="a red").wait_for()
    assert "square" not in await answer.inner_text()
    assert await visit.page.is_disabled("#ask")
    await visit.page.click("#stop")
    await visit.page.get_by_text("Stopped.").wait_for()
    await until(lambda: language.open == 0)
    assert await visit.page.is_enabled("#ask")
    assert not await visit.page.inner_text("#trouble")


async def test_an_image_is_sent_once_for_many_questions_and_earlier_ones_stay(visit: Visit, service: Kept):
    await visit.choose(png())
    for question in ("what?", "where?"):
        await visit.ask(question)
        await visit.answers()
    assert len(visit.posted("/v1/images")) == 1
    assert await visit.page.locator("#answers h3").all_inner_texts() == ["where?", "what?"]
    service.house.pipeline.images.store = ImageStore(100_000_000, 3600)  # as a service that was started again
    await visit.ask("how many?")
    assert await visit.answers() == ["a red square"]
    assert len(visit.posted("/v1/images")) == 2


@pytest.mark.parametrize("way", ["drop", "paste"])
async def test_an_image_is_dropped_or_pasted(visit: Visit, way: str):
    await visit.page.evaluate(DROP, ["dropped.png", text_of(png()), way])
    await visit.page.wait_for_selector("#stage canvas[aria-label^='dropped.png']")
    await visit.ask("what is there?")
    assert await visit.answers() == ["a red square"]


async def test_two_settings_stand_side_by_side(visit: Visit):
    await visit.choose(png(size=(500, 400)))
    await visit.page.click("#settings summary")
    await visit.page.check("#compare")
    assert await visit.page.input_value("#detail-b") == "high"
    await visit.page.fill("#vision-a-most", "100")
    await visit.page.fill("#visual-b-least", "64")
    await visit.page.select_option("#fit-b", "pad")
    await visit.ask("what is there?")
    assert await visit.answers() == ["a red square"] * 2
    first, second = (request.post_data_json for request in visit.posted("/v1/vqa"))
    assert first["budget"] == {"vision_tokens": [64, 100]}
    assert "detail" not in first
    assert "fit" not in first
    assert (second["detail"], second["fit"], second["budget"]) == ("high", "pad", {"visual_tokens": [64, 64]})
    boxes = [await each.bounding_box() for each in await visit.page.locator("#stage canvas").all()]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    labels = await visit.page.locator("#stage figcaption").all_inner_texts()
    assert labels == ["A: detail low, 64 to 100 vision tokens", "B: detail high, fit pad, 64 visual tokens"]
    assert await visit.page.locator(".bar").count() == 2


async def test_every_view_draws_another_picture(visit: Visit):
    await visit.choose(png(size=(300, 200)))
    await visit.ask("what is there?")
    await visit.answers()
    pale = await visit.picture()
    await visit.page.fill("#strength", "1")
    shown = {await visit.picture()}
    assert pale not in shown
    await visit.page.focus("#views input:checked")
    for _ in range(4):
        await visit.page.keyboard.press("ArrowDown")
        shown.add(await visit.picture())
    assert len(shown) == 3  # the service gives three ways the same values, and pales all cells of the levels


async def test_facts_tensions_and_timings_are_words(visit: Visit):
    await visit.choose(png())
    await visit.ask("what is there?")
    await visit.answers()
    facts = await visit.page.inner_text(".facts")
    assert "image encoded anew" in facts
    assert "vision tokens" in facts
    assert "queue" in await visit.page.inner_text(".key")
    await visit.page.click(".run details:has(.tensions) summary")
    assert "0.50: balanced" in await visit.page.inner_text(".tensions")


# Errors.
async def test_an_empty_question_is_told_at_its_field(visit: Visit):
    await visit.choose(png())
    await visit.ask("   ")
    assert await visit.page.inner_text("#question-fault") == "Write a question first."
    assert await visit.page.get_attribute("#question", "aria-invalid") == "true"
    assert await visit.page.evaluate("document.activeElement.id") == "question"
    assert visit.posted("/v1/vqa") == []


async def test_a_question_without_an_image_is_told(visit: Visit):
    await visit.ask("what is there?")
    assert await visit.page.inner_text(TROUBLE) == "No image yet"


async def test_a_file_that_is_no_image_is_told(visit: Visit):
    await visit.choose(b"some words", "notes.txt")
    await visit.page.wait_for_selector(TROUBLE)
    assert "notes.txt is not an image" in await visit.page.inner_text("#trouble")


async def test_an_image_that_the_service_does_not_read_is_told(visit: Visit):
    await visit.choose(icon(), "old.ico")
    await visit.ask("what is there?")
    await visit.page.wait_for_selector(TROUBLE)
    assert await visit.page.inner_text(TROUBLE) == "This file is not an image or a video that the service reads"


async def test_a_full_service_is_asked_again_after_its_time(visit: Visit, service: Kept):
    service.house.vision.fault = Overloaded("the service is full: retry after 8 s", retry_after_s=8.0)
    await visit.page.clock.install()
    await visit.choose(png())
    await visit.ask("what is there?")
    assert await visit.page.inner_text(TROUBLE) == "The service is full"
    again = visit.page.locator("#trouble button")
    assert await again.is_disabled()
    assert "Ask again in" in await again.inner_text()
    service.house.vision.fault = None
    await visit.page.clock.run_for(8_000)
    await again.click()
    assert await visit.answers() == ["a red square"]
    assert not await visit.page.inner_text("#trouble")


async def test_a_model_that_does_not_answer_is_told(visit: Visit, service: Kept):
    service.house.vision.fault = Unavailable("the model see does not answer: retry in a few seconds")
    await visit.choose(png())
    await visit.ask("what is there?")
    assert await visit.page.inner_text(TROUBLE) == "The service is not ready"
    assert "The model see does not answer" in await visit.page.inner_text("#trouble")


async def test_an_error_amid_the_answer_keeps_its_text(visit: Visit, service: Kept):
    language = service.house.language
    language.wait_at, language.fault = 2, Unavailable("the model llm does not answer: retry in a few seconds")
    await visit.choose(png())
    await visit.ask("what is there?")
    await visit.page.wait_for_selector(TROUBLE)
    assert await visit.page.inner_text(TROUBLE) == "The answer broke off"
    assert await visit.page.inner_text("#answers .answer") == "a red"


async def test_a_service_that_is_gone_is_told(visit: Visit, service: Kept):
    await visit.choose(png())
    await service.stop()
    await visit.ask("what is there?")
    await visit.page.wait_for_selector(TROUBLE)
    assert await visit.page.inner_text(TROUBLE) == "The service does not answer"
    await visit.page.wait_for_selector("#health.down")


async def test_what_a_service_says_is_never_markup(visit: Visit, service: Kept):
    service.house.language.say("<img src=x onerror=alert(1)>")
    await visit.choose(png(), "<b>photo</b>.png")
    await visit.ask("<i>what</i>?")
    assert await visit.answers() == ["<img src=x onerror=alert(1)>"]
    assert await visit.page.locator("#answers img, #answers i, #stage b").count() == 0


async def test_an_image_that_is_chosen_while_an_answer_comes_stays(visit: Visit, service: Kept):
    language = service.house.language
    language.gate.clear()
    language.wait_at = 2
    await visit.choose(png(), "first.png")
    await visit.ask("what is there?")
    await visit.page.locator("#answers .answer").filter(has_text="a red").wait_for()
    await visit.choose(png((1, 2, 3)), "second.png")
    await visit.page.wait_for_selector("#stage canvas[aria-label^='second.png']")
    language.gate.set()
    assert await visit.answers() == ["a red square"]
    assert await visit.page.locator("#stage canvas[aria-label^='second.png']").count() == 1
    await visit.page.get_by_role("button", name="Show on the image").click()
    assert await visit.page.locator("#stage canvas[aria-label^='first.png']").count() == 1


async def test_asking_again_repeats_what_failed(visit: Visit, service: Kept):
    service.house.vision.fault = Unavailable("the model see does not answer: retry in a few seconds")
    await visit.choose(png(), "first.png")
    await visit.ask("what is there?")
    await visit.page.wait_for_selector(TROUBLE)
    service.house.vision.fault = None
    await visit.page.fill("#question", "another question?")
    await visit.page.click("#settings summary")
    await visit.page.check("#compare")
    await visit.page.click("#trouble button")
    assert await visit.answers() == ["a red square"]
    asked = [each.post_data_json for each in visit.posted("/v1/vqa")]
    assert asked[0] == asked[1]
    assert await visit.page.input_value("#question") == "another question?"


async def test_what_failed_can_be_asked_again_though_its_image_was_exchanged_meanwhile(visit: Visit, service: Kept):
    language = service.house.language
    language.gate.clear()
    language.wait_at = 2
    await visit.choose(png(), "first.png")
    await visit.ask("what is there?")
    await visit.page.locator("#answers .answer").filter(has_text="a red").wait_for()
    await visit.choose(png((1, 2, 3)), "second.png")
    await visit.page.wait_for_selector("#stage canvas[aria-label^='second.png']")
    language.fault = Unavailable("the model llm does not answer: retry in a few seconds")
    language.gate.set()
    await visit.page.wait_for_selector(TROUBLE)
    language.fault = None
    await visit.page.click("#trouble button")
    assert await visit.answers() == ["a red square"]
    await visit.page.get_by_role("button", name="Show on the image").click()
    assert await visit.page.locator("#stage canvas[aria-label^='first.png']").count() == 1


async def test_a_wrong_value_in_a_setting_that_is_not_shown_stops_nothing(visit: Visit):
    await visit.choose(png())
    await visit.page.click("#settings summary")
    await visit.page.check("#compare")
    await visit.page.fill("#vision-b-most", "7")
    await visit.page.uncheck("#compare")
    await visit.ask("what is there?")
    assert await visit.answers() == ["a red square"]


async def test_a_wrong_value_in_closed_settings_is_shown(visit: Visit):
    await visit.choose(png())
    await visit.page.click("#settings summary")
    await visit.page.fill("#vision-a-most", "7")
    await visit.page.click("#settings summary")
    await visit.ask("what is there?")
    await visit.page.wait_for_selector("#settings[open]")
    assert await visit.page.evaluate("document.activeElement.id") == "vision-a-most"
    assert visit.posted("/v1/vqa") == []


async def code_of(visit: Visit, language: str) -> str:
    await visit.page.get_by_role("button", name=language, exact=True).click()
    return await visit.page.inner_text(".code code")


@pytest.mark.parametrize("language", ["Python", "JavaScript"])
async def test_the_request_as_code_tells_an_error_amid_the_answer_and_keeps_every_character(
    visit: Visit, service: Kept, tmp_path: Path, language: str
):
    model, command = service.house.language, COMMANDS[language]
    (tmp_path / "photo.png").write_bytes(png())
    await visit.choose(png())
    await visit.ask("what is there?")
    await visit.answers()
    await visit.page.click(".code summary")
    code = await code_of(visit, language)
    model.say("a\u2028red\x85square")
    assert await done(command, code, tmp_path) == (0, "a\u2028red\x85square")
    model.say("a red square")
    model.wait_at, model.fault = 2, Unavailable("the model llm does not answer: retry in a few seconds")
    status, said = await done(command, code, tmp_path)
    assert status != 0
    assert "the model llm does not answer" in said


async def done(command: list[str], code: str, folder: Path, **environment: str) -> tuple[int, str]:
    """Run code -> its exit status and all that it said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        code,
        cwd=folder,
        env=os.environ | {"no_proxy": "127.0.0.1", "PYTHONIOENCODING": "utf-8"} | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, said.decode()


# Screens, keyboard and privacy.
async def test_a_telephone_scrolls_in_one_direction_only(service: Kept, open_page: Open):
    visit = await open_page(service.url, **PHONE)
    await visit.choose(png(size=(300, 200)), "a_very_long_name_" * 8 + ".png")
    await visit.page.click("#settings summary")
    await visit.page.check("#compare")
    await visit.ask("w" * 60)
    assert await visit.answers() == ["a red square"] * 2
    await visit.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert await visit.page.evaluate(wide) == 0
    assert await visit.page.is_visible("#camera-button")


async def test_the_keyboard_alone_asks(visit: Visit):
    page = visit.page
    for _ in range(20):
        await page.keyboard.press("Tab")
        assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or (
            await page.evaluate("document.activeElement.type") == "file"  # its label has the outline
        )
        if await page.evaluate("document.activeElement.closest('#examples') !== null"):
            break
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#suggestions button")
    while await page.evaluate("document.activeElement.id") != "question":
        await page.keyboard.press("Tab")
    await page.keyboard.type("what is there?")
    await page.keyboard.press("Enter")
    assert await visit.answers() == ["a red square"]


async def test_every_control_has_a_name(visit: Visit):
    await visit.choose(png())
    await visit.ask("what is there?")
    await visit.answers()
    nameless = """() => [...document.querySelectorAll("input, select, button, img, canvas[role=img]")].filter((each) =>
        !(each.labels?.length || each.textContent.trim() || each.alt || each.ariaLabel
          || each.querySelector("img[alt]"))).map((each) => each.outerHTML)"""
    assert await visit.page.evaluate(nameless) == []


async def test_nothing_is_kept_in_the_browser(visit: Visit):
    await visit.choose(png())
    await visit.ask("what is there?")
    await visit.answers()
    assert await visit.page.context.cookies() == []
    kept = "(async () => localStorage.length + sessionStorage.length + (await indexedDB.databases()).length)()"
    assert await visit.page.evaluate(kept) == 0


async def test_a_service_with_keys_asks_for_one_and_keeps_it_in_the_pages_memory(browser: Browser, tmp_path: Path):
    keys = Keys(tmp_path)
    key = keys.make("acme")
    async with kept(keys=str(keys.path)) as service:
        context = await browser.new_context()
        page = await context.new_page()
        visit = Visit(page, service.url)
        await page.goto(service.url)
        await page.fill("#key", "glk_00000000_wrong")
        await page.press("#key", "Enter")
        await page.get_by_text("The API key is not valid").wait_for()
        await page.fill("#key", key)
        await page.press("#key", "Enter")
        await page.wait_for_selector("#model:not([hidden])")
        assert await page.is_hidden("#key-form")
        await visit.choose(png())
        await visit.ask("what is there?")
        assert await visit.answers() == ["a red square"]
        links = await page.locator("nav a:visible").all_inner_texts()
        assert links == ["API", "Health", "OpenAPI"]  # the others need the key, which a link does not send
        (tmp_path / "photo.png").write_bytes(png())
        await page.click(".code summary")
        for language, command in COMMANDS.items():
            code = await code_of(visit, language)
            assert key not in code
            status, said = await done(command, code, tmp_path, GLIMPSE_API_KEY=key)
            assert status == 0, said
            assert "[DONE]" in said if language == "curl" else said == "a red square"
        kept_by_browser = "() => JSON.stringify([localStorage, sessionStorage, document.cookie])"
        assert await page.evaluate(kept_by_browser) == '[{},{},""]'
        await page.reload()
        await page.wait_for_selector("#key-form:not([hidden])")
        assert await page.input_value("#key") == ""
        visit.check()
        await context.close()
