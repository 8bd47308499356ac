"""axe-core finds no serious barrier on the page. The set-up for development fetches it from npm."""

from __future__ import annotations

import pytest

from tests.service.edges.web.conftest import Kept, Open, Visit
from tests.support import films
from tests.support.documents import RED, filled, pdf
from tests.support.fakes import png
from tests.support.paths import NODE_MODULES

AXE = NODE_MODULES / "axe-core" / "axe.min.js"
SERIOUS = ("serious", "critical")
# It asks for no file of its own, so that the page's policy holds. The page has no frames.
RUN = "axe.run(document, {resultTypes: ['violations'], preload: false, iframes: false})"
# The document is the same in the dark: of the rules above, those about colours.
COLOURS = RUN.replace("{", "{runOnly: {type: 'rule', values: ['color-contrast', 'link-in-text-block']}, ")

pytestmark = [
    pytest.mark.needs("chromium"),
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.needs("npm's axe-core"),
]


@pytest.mark.parametrize(
    ("context", "run"),
    [
        ({"color_scheme": "light"}, RUN),
        ({"color_scheme": "dark"}, COLOURS),
        ({"viewport": {"width": 320, "height": 640}, "is_mobile": True, "has_touch": True}, RUN),
    ],
    ids=["light", "dark", "telephone"],
)
async def test_no_serious_barrier(service: Kept, open_page: Open, context: dict[str, object], run: str) -> None:
    visit = await open_page(service.url, **context)
    await visit.page.evaluate(AXE.read_text())
    found = [("at first", each) for each in (await visit.page.evaluate(run))["violations"]]
    await visit.ask("")  # an error at the field
    found += [("with an error", each) for each in (await visit.page.evaluate(run))["violations"]]
    await visit.choose(png())
    await visit.ask("what is there?")
    await visit.answers()
    for closed in await visit.page.locator("details:not([open]) > summary").all():
        if await closed.is_visible():
            await closed.click()
    found += [("with an answer", each) for each in (await visit.page.evaluate(run))["violations"]]
    await visit.choose(films.gif(), "clip.gif")
    await visit.page.wait_for_selector("#stage img")
    found += [("with an image that moves", each) for each in (await visit.page.evaluate(run))["violations"]]
    await visit.choose(pdf([filled(RED)]), "report.pdf")
    await visit.page.wait_for_selector("#stage .empty")
    await visit.ask("what is there?")
    await visit.answers()
    found += [("with a document", each) for each in (await visit.page.evaluate(run))["violations"]]
    serious = [
        (when, each["id"], each["help"], [node["html"][:200] for node in each["nodes"]])
        for when, each in found
        if each["impact"] in SERIOUS
    ]
    assert serious == []


async def test_a_planted_barrier_is_found(visit: Visit) -> None:
    await visit.page.evaluate(AXE.read_text())
    await visit.page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    found = (await visit.page.evaluate(RUN))["violations"]
    assert [each["id"] for each in found if each["impact"] in SERIOUS] == ["button-name"]


async def test_a_planted_colour_is_found(visit: Visit) -> None:
    await visit.page.evaluate(AXE.read_text())
    await visit.page.evaluate(
        "Object.assign(document.querySelector('label[for=question]').style, {color: '#777', backgroundColor: '#666'})"
    )
    found = (await visit.page.evaluate(COLOURS))["violations"]
    assert [each["id"] for each in found if each["impact"] in SERIOUS] == ["color-contrast"]
