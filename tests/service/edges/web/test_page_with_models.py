"""The page in a real Chromium in front of the real Triton: right answers, the map on the object, requests as code."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.edges.web.conftest import COMMANDS, Open, Visit
from tests.support.paths import SCENES
from tests.support.servers import Gateway

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

DESCRIPTION = (
    "a large blue ring, a large pink square with 8, a large cyan triangle with 5 and a medium blue square with x"
)
# Questions that the committed scenes do not ask in these words.
MORE = {
    "what character is on the pink square?": "8",
    "how many objects are there?": "4",
    "describe the image.": DESCRIPTION,
}
LENGTHS = """() => {
    window.lengths = new Set();
    new MutationObserver(() => lengths.add(document.querySelector("#answers .answer")?.textContent.length ?? 0))
        .observe(document.getElementById("answers"), { childList: true, subtree: true, characterData: true });
}"""
PIXEL = """(canvas, [x, y]) => {
    const one = new OffscreenCanvas(1, 1).getContext("2d");
    one.drawImage(canvas, -x * canvas.width, -y * canvas.height);
    return [...one.getImageData(0, 0, 1, 1).data];
}"""


async def example(visit: Visit, number: int) -> None:
    await visit.page.click(f"#examples li:nth-child({number + 1}) button")
    await visit.page.wait_for_selector("#stage canvas")


async def test_the_right_answer_streams_and_the_map_shows_its_object(gateway: Gateway, open_page: Open):
    visit = await open_page(gateway.url, viewport={"width": 1280, "height": 900})
    await example(visit, 0)
    await visit.page.evaluate(LENGTHS)
    await visit.page.get_by_role("button", name="describe the image.").click()
    assert await visit.answers() == [DESCRIPTION]
    assert await visit.page.evaluate("lengths.size") > 3
    before = await visit.picture()
    await visit.page.get_by_role("button", name="what character is on the pink square?").click()
    assert await visit.answers() == ["8"]
    assert "features from the cache" in await visit.page.locator(".facts").first.inner_text()
    assert await visit.picture() != before
    canvas = visit.page.locator("#stage canvas")
    on, off = [await canvas.evaluate(PIXEL, place) for place in ([0.25, 0.7], [0.1, 0.05])]
    assert min(on[:2]) > 2 * on[2]  # yellow on the pink square
    assert min(off[:2]) <= off[2]
    assert "Most relevant: bottom" in await visit.page.inner_text("#said")


async def test_a_closer_look_reads_small_print(gateway: Gateway, open_page: Open):
    visit = await open_page(gateway.url)
    await example(visit, 5)
    await visit.page.click("#settings summary")
    await visit.page.check("#compare")
    await visit.ask("which character is on the small cross?")
    assert (await visit.answers())[1] == "8"
    assert "at twice the resolution" in await visit.page.inner_text("#caption")


async def test_the_page_says_what_the_model_knows(gateway: Gateway, open_page: Open):
    visit = await open_page(gateway.url)
    assert "It knows nothing else" in await visit.page.inner_text("#knows")
    assert await visit.page.is_hidden("#foreign")
    await visit.choose((SCENES / "new_000.webp").read_bytes(), "mine.webp")
    await visit.page.wait_for_selector("#foreign:not([hidden])")


async def test_the_examples_have_right_answers(gateway: Gateway, open_page: Open):
    """Nothing suggests a question that the model cannot answer."""
    visit = await open_page(gateway.url)
    address = json.dumps(f"{gateway.url}/page/examples.js")
    examples: list[dict[str, Any]] = await visit.page.evaluate(f"import({address}).then((module) => module.EXAMPLES)")
    asked = [json.loads(line) for line in (SCENES / "questions.jsonl").read_text().splitlines()]
    truth = {(each["image"], each["question"]): each["answer"] for each in asked}
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60, trust_env=False) as http:
        for each in examples:
            image = (await http.post("/v1/images", content=(SCENES / each["file"]).read_bytes())).json()["id"]
            for question in each["questions"]:
                fields = {"image": image, "question": question, "detail": each.get("detail", "low")}
                answer = (await http.post("/v1/vqa", json=fields)).json()["answer"]
                assert answer == truth.get((each["file"], question), MORE.get(question)), (each["file"], question)


@pytest.mark.needs("curl")
async def test_the_request_as_code_asks_the_same(gateway: Gateway, open_page: Open, tmp_path: Path):
    """A file and a question that need quoting, in every language."""
    name = 'it\'s a "scene".webp'
    shutil.copy(SCENES / "new_003.webp", tmp_path / name)
    visit = await open_page(gateway.url)
    await visit.choose((tmp_path / name).read_bytes(), name)
    await visit.page.click("#settings summary")
    await visit.page.fill("#vision-a-most", "128")
    await visit.ask("what's on the pink square? \"$HOME\" \\ 'x'")
    (answer,) = await visit.answers()
    await visit.page.click(".code summary")
    said = {}
    for language, command in COMMANDS.items():
        await visit.page.get_by_role("button", name=language, exact=True).click()
        said[language] = await run([*command, await visit.page.inner_text(".code code")], tmp_path)
    events = [json.loads(line[6:]) for line in said["curl"].splitlines() if line.startswith("data: {")]
    assert "".join(event.get("delta", "") for event in events) == answer
    assert said["Python"] == said["JavaScript"] == answer


async def run(command: list[str], folder: Path) -> str:
    """What the command prints. Fails if its exit status is not 0."""
    pipe = asyncio.subprocess.PIPE
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=environment, stdout=pipe, stderr=pipe)
    printed, complained = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, complained.decode()
    return printed.decode().strip()
