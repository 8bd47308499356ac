"""The gateway as a process of its own, in front of a real Triton with the committed models."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from io import BytesIO

import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image as Pillow

from tests.support.documents import pdf, showing
from tests.support.paths import PROJECT, SCENES
from tests.support.servers import Gateway, eventually, eventually_async

QUESTIONS = (
    "what colour is the cross?",
    "how many objects are there?",
    "is there a red circle?",
    "which shape is the large green object?",
)


@pytest_asyncio.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60, limits=limits) as http:
        yield http


@pytest.fixture(scope="module")
def scenes() -> list[bytes]:
    return [path.read_bytes() for path in sorted(SCENES.glob("new_*.webp"))[:40]]


def a_new_image(seed: int) -> bytes:
    """224x224 pixels that no other test sends."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    out = BytesIO()
    Pillow.fromarray(noise).resize((224, 224), Pillow.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


async def answer(http: httpx.AsyncClient, image: bytes | str, question: str, **fields: object) -> dict:
    if isinstance(image, bytes):
        image = (await http.post("/v1/images", content=image)).raise_for_status().json()["id"]
    body = {"image": image, "question": question, "max_tokens": 8, **fields}
    return (await http.post("/v1/vqa", json=body)).raise_for_status().json()


def tokens_at(levels: np.ndarray) -> int:
    """Vision tokens of these levels of detail: none at level -1."""
    return int(np.array([0, 1, 4, 16])[levels + 1].sum())


async def streamed(http: httpx.AsyncClient, **body: object) -> tuple[str, dict]:
    """The deltas put together, and the last event."""
    async with http.stream("POST", "/v1/vqa", json=body | {"stream": True}) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    return "".join(event["delta"] for event in events[:-1]), events[-1]


async def test_an_answer_comes_from_the_models(http, scenes, card):
    said = await answer(http, a_new_image(1), QUESTIONS[0], explain=True)
    assert said["model"] == card.name
    assert said["answer"]
    assert said["finish_reason"] in ("stop", "length")
    assert said["usage"]["image_tokens"] == said["vision"]["visual_tokens"] >= card.visual_tokens[0]
    assert card.vision_tokens[0] <= said["vision"]["vision_tokens"] <= card.vision_tokens[1]
    (relevance,) = said["relevance"]
    levels = np.array(relevance["levels"])
    assert tokens_at(levels) == said["vision"]["vision_tokens"]
    assert 0 <= np.min(relevance["map"]) <= np.max(relevance["map"]) <= 1


async def test_the_second_question_about_an_image_hits_and_says_the_same_as_a_miss(http, gateway):
    image = a_new_image(2)
    miss = await answer(http, image, QUESTIONS[0])
    hit = await answer(http, image, QUESTIONS[0])
    assert [miss["vision"]["cache"], hit["vision"]["cache"]] == ["miss", "hit"]
    assert hit["answer"] == miss["answer"]
    assert hit["image_ids"] == miss["image_ids"]


async def test_several_images_and_earlier_turns_have_an_answer(http, scenes):
    ids = [(await http.post("/v1/images", content=scene)).json()["id"] for scene in scenes[:2]]
    alone = await answer(http, ids[0], QUESTIONS[1])
    body = {"images": ids, "question": QUESTIONS[1], "max_tokens": 8, "explain": True}
    both = (await http.post("/v1/vqa", json=body)).raise_for_status().json()
    assert both["image_ids"] == ids
    assert both["usage"]["image_tokens"] == 2 * alone["usage"]["image_tokens"]
    assert len(both["relevance"]) == 2
    said = await answer(http, ids[0], QUESTIONS[2], turns=[{"question": QUESTIONS[1], "answer": alone["answer"]}])
    assert said["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"]


async def test_a_closer_view_is_looked_at_where_the_model_has_one(http, card):
    image = BytesIO()
    Pillow.open(BytesIO(a_new_image(6))).resize((448, 448)).save(image, "PNG")
    if not card.closer_view:
        pytest.skip(f"{card.name} has no closer view")
    low = await answer(http, image.getvalue(), QUESTIONS[0])
    high = await answer(http, image.getvalue(), QUESTIONS[0], detail="high", explain=True)
    again = await answer(http, image.getvalue(), QUESTIONS[1], detail="high")
    assert [each["vision"]["detail"] for each in (low, high, again)] == ["low", "high", "high"]
    assert [each["vision"]["cache"] for each in (low, high, again)] == ["miss", "miss", "hit"]
    levels = np.array(high["relevance"][0]["levels"])
    assert tokens_at(levels) == high["vision"]["vision_tokens"]


async def test_a_tight_budget_leaves_cells_out_and_still_reads_small_print(http, card):
    """One token for each of the 64 cells reads about one question in seven."""
    if not card.closer_view:
        pytest.skip("the model has no closer view")
    asked = [json.loads(line) for line in (SCENES / "questions.jsonl").read_text().splitlines()]
    reading = [each for each in asked if (each["split"], each["type"]) == ("small_print", "read")][:40]
    right = 0
    for each in reading:
        found = await answer(
            http, (SCENES / each["image"]).read_bytes(), each["question"],
            detail="high", explain=True, budget={"vision_tokens": [64, 64]},
        )  # fmt: skip
        levels = np.array(found["relevance"][0]["levels"])
        assert tokens_at(levels) == found["vision"]["vision_tokens"] <= 64
        assert (levels < 0).any()
        right += found["answer"] == each["answer"]
    assert right > len(reading) / 2


def a_page(size: tuple[int, int], place: tuple[int, int]) -> bytes:
    """A committed scene, 300 pixels a side, on a page of its ground's colour."""
    with Pillow.open(SCENES / "new_003.webp") as picture:
        scene = picture.convert("RGB").resize((300, 300))
    page, out = Pillow.new("RGB", size, scene.getpixel((0, 0))), BytesIO()
    page.paste(scene, place)
    page.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("size", "place", "padded", "part"),
    [
        ((300, 900), (0, 600), [-1, 0, 2, 1], [0, 2 / 3, 1, 1]),
        ((900, 300), (300, 0), [0, -1, 1, 2], [1 / 3, 0, 2 / 3, 1]),
    ],
)
async def test_a_page_is_seen_as_asked_and_its_maps_say_where_they_lie(http, repository, size, place, padded, part):
    page = (await http.post("/v1/images", content=a_page(size, place))).raise_for_status().json()["id"]
    question = "what character is on the pink square?"
    said = {fit: await answer(http, page, question, fit=fit, explain=True) for fit in ("squash", "pad", "tiles")}
    assert [each["vision"]["cache"] for each in said.values()][:2] == ["miss", "miss"]
    assert [said[fit]["vision"]["fit"] for fit in ("squash", "pad")] == ["squash", "pad"]
    assert said["squash"]["relevance"][0]["area"] == [0, 0, 1, 1]
    assert said["pad"]["relevance"][0]["area"] == padded
    again = await answer(http, page, question, fit="pad", explain=True)
    assert (again["vision"]["cache"], again["relevance"]) == ("hit", said["pad"]["relevance"])
    if repository != PROJECT / "model_repository":
        return
    tile = said["tiles"]
    assert (tile["answer"], tile["vision"]["fit"], tile["vision"]["visual_tokens"]) == ("8", "tiles", 32)
    assert tile["relevance"][0]["area"] == pytest.approx(part, abs=1e-4)
    map_ = np.array(tile["relevance"][0]["map"])
    with Pillow.open(SCENES / "new_003.webp") as picture:
        colours = np.asarray(picture.convert("RGB").resize((16, 16)), float)
    row, column = np.unravel_index(map_.argmax(), map_.shape)
    red, green, blue = colours[row, column]
    assert red > max(green, blue)  # the peak lies on the pink square
    high = await answer(http, page, question, fit="tiles", detail="high", explain=True)
    assert (high["vision"]["fit"], high["vision"]["detail"]) == ("tiles", "high")
    assert high["relevance"][0]["area"] == tile["relevance"][0]["area"]


async def test_the_stream_put_together_is_the_answer(http, scenes):
    for question in QUESTIONS:
        whole = await answer(http, scenes[0], question)
        text, end = await streamed(http, image=whole["image_ids"][0], question=question, max_tokens=8)
        assert text == whole["answer"]
        assert end["usage"] == whole["usage"]


async def test_the_same_seed_draws_the_same_answer(http, scenes):
    said = [await answer(http, scenes[1], QUESTIONS[1], temperature=2.0, seed=5) for _ in range(2)]
    assert said[0]["answer"] == said[1]["answer"]


async def test_a_smaller_budget_keeps_fewer_vision_tokens(http, scenes, card):
    least = card.vision_tokens[0]
    said = await answer(http, scenes[2], QUESTIONS[0], budget={"vision_tokens": [least, least + 48]})
    assert least <= said["vision"]["vision_tokens"] <= least + 48


async def test_thirty_two_at_once_all_get_the_answer_they_get_alone(http, scenes):
    asked = [(scenes[i], QUESTIONS[i % len(QUESTIONS)]) for i in range(32)]
    together = await asyncio.gather(*(answer(http, image, question) for image, question in asked))
    alone = [await answer(http, image, question) for image, question in asked[:4]]
    assert [said["answer"] for said in together[:4]] == [said["answer"] for said in alone]


async def test_one_new_image_for_many_callers_is_encoded_once(http, gateway):
    before = await lookups(http)
    image_id = (await http.post("/v1/images", content=a_new_image(3))).json()["id"]
    said = await asyncio.gather(*(answer(http, image_id, question) for question in QUESTIONS * 4))
    after = await lookups(http)
    assert sorted(each["vision"]["cache"] for each in said) == ["hit"] * 15 + ["miss"]
    assert after["miss"] - before["miss"] == 1


async def test_two_gateways_that_share_a_redis_encode_a_new_image_once(start_gateway, triton, redis_server):
    url = triton.access.url
    # A second for Redis: this machine runs everything at once, and a miss would hide what is tested.
    settings = {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_REDIS_URL": redis_server.url}
    settings |= {"GLIMPSE_REDIS_TIMEOUT_S": "1", "GLIMPSE_REDIS_FLIGHT_S": "10"}
    with start_gateway(settings) as one, start_gateway(settings) as other:
        limits = httpx.Limits(max_connections=64)
        async with (
            httpx.AsyncClient(base_url=one.url, timeout=60, limits=limits) as first,
            httpx.AsyncClient(base_url=other.url, timeout=60, limits=limits) as second,
        ):
            form = {"question": QUESTIONS[0], "max_tokens": "8"}
            files = {"image": a_new_image(5)}
            asked = [http.post("/v1/vqa", files=files, data=form) for http in (first, second) * 25]
            said = [response.raise_for_status().json() for response in await asyncio.gather(*asked)]
            assert sorted(each["vision"]["cache"] for each in said) == ["hit"] * 49 + ["miss"]
            assert len({each["answer"] for each in said}) == 1  # whoever found it in Redis says the same
            metrics = (await first.get("/metrics")).text + (await second.get("/metrics")).text
            assert metrics.count('glimpse_feature_cache_lookups_total{result="shared",tier="redis"} 1.0') == 1


def test_proxies_of_the_environment_come_between_nothing(start_gateway, triton, redis_server):
    """Neither between the gateway and its Triton or Redis, nor between the command and the gateway."""
    names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    proxies = {each: "http://127.0.0.1:1" for name in names for each in (name, name.upper())}
    proxies |= {"no_proxy": "", "NO_PROXY": ""}
    url = triton.access.url
    settings = {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_REDIS_URL": redis_server.url}
    with start_gateway(settings | proxies) as gateway:
        code = "from service.cli.main import main; main()"
        command = [sys.executable, "-c", code, "ask", "-", QUESTIONS[1], "--json", "--url", gateway.url]
        environment = {**os.environ, **proxies}
        done = subprocess.run(
            command, input=a_new_image(7), env=environment, capture_output=True, check=False, timeout=60
        )
        assert json.loads(done.stdout)["answer"], done.stderr
        eventually(lambda: redis_server.client.keys("glimpse:*:features:*"), 10, "features in Redis")


async def lookups(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    name = "glimpse_feature_cache_lookups_total"
    labels = {result: f'{{result="{result}",tier="memory"}}' for result in ("hit", "miss", "shared")}
    return {
        result: next((float(line.split()[1]) for line in lines if line.startswith(name + label)), 0)
        for result, label in labels.items()
    }


async def test_bad_inputs_are_refused_and_the_service_goes_on(http, scenes):
    bad = [
        http.post("/v1/vqa", content=b"{", headers={"content-type": "application/json"}),
        http.post("/v1/vqa", json={"image": "img_none", "question": "?"}),
        http.post("/v1/vqa", json={"image": "", "question": "?"}),
        http.post("/v1/vqa", json={"image": "aGVsbG8=", "question": "?"}),
        http.post("/v1/vqa", json={"image": "aGVsbG8=", "question": "?", "unknown": 1}),
        http.post("/v1/images", content=b""),
        http.post("/v1/images", content=scenes[0][:1000]),
        http.post("/v1/images", content=bytes(20_000_001)),
        http.post("/v1/images", content=b"\x89PNG\r\n\x1a\n" + bytes(100)),
        http.get("/nowhere"),
    ]
    refused = await asyncio.gather(*bad)
    assert [response.status_code for response in refused] == [400, 404, 400, 400, 400, 400, 400, 413, 400, 404]
    assert all(response.json()["error"]["message"] for response in refused)
    assert (await answer(http, scenes[0], QUESTIONS[0]))["answer"]
    assert (await http.get("/health/ready")).status_code == 200


async def test_a_body_that_is_larger_than_it_says_nothing_of_is_cut_off(http):
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(500):
            yield bytes(100_000)

    assert (await http.post("/v1/images", content=chunks())).status_code == 413


async def test_a_caller_who_hangs_up_leaves_no_slot_taken(http, scenes):
    image_id = (await http.post("/v1/images", content=scenes[3])).json()["id"]
    for _ in range(8):
        body = {"image": image_id, "question": QUESTIONS[0], "max_tokens": 64, "stream": True}
        async with http.stream("POST", "/v1/vqa", json=body) as response:
            await anext(response.aiter_bytes())

    async def nobody_is_in() -> bool:
        return "glimpse_requests_in_flight 0.0" in (await http.get("/metrics")).text

    await eventually_async(nobody_is_in, 10, "every slot free")


def test_it_is_alive_before_it_is_ready_and_stops_while_it_starts(starting, tmp_path):
    eventually(lambda: starting.status("/health/live") == 200, 20, "alive")
    assert httpx.get(f"{starting.url}/health/ready").json()["faults"]["llm"]
    eventually((tmp_path / "triton.log").exists, 20, "Triton begun")
    starting.process.send_signal(signal.SIGTERM)
    assert starting.process.wait(20) == 0
    assert "Traceback" not in starting.log()


def test_ctrl_c_stops_a_service_that_is_ready(starting):
    eventually(lambda: "ready on" in starting.log(), 60, "ready")
    assert starting.status("/health/ready") == 200
    image = {"image": a_new_image(4), "question": (None, QUESTIONS[0])}
    assert httpx.post(f"{starting.url}/v1/vqa", files=image, timeout=30).json()["answer"]
    starting.process.send_signal(signal.SIGINT)
    assert starting.process.wait(20) == 0
    said = starting.log()
    assert said.endswith("Glimpse has stopped.\n")
    assert "Traceback" not in said


async def test_a_full_house_of_new_and_known_images_streamed_and_not_all_get_answers(http, scenes):
    """Twelve follow-ups and four new images at a time, twice over, from three tenants."""
    tenants = [{}, {"x-tenant-id": "tenant-1"}, {"x-tenant-id": "tenant-2"}]

    async def sent(image: bytes, tenant: int) -> str:
        return (await http.post("/v1/images", content=image, headers=tenants[tenant])).json()["id"]

    known = [[await sent(scene, tenant) for scene in scenes[:4]] for tenant in range(3)]
    for image in known[0]:
        await answer(http, image, QUESTIONS[0])
    new = [await sent(a_new_image(100 + i), 4 * i % 3) for i in range(8)]

    async def one(number: int) -> str:
        tenant = number % 3
        image = new[number // 4] if number % 4 == 0 else known[tenant][number % 4]
        body = {"image": image, "question": QUESTIONS[number % 4], "max_tokens": 1 + number % 16}
        if tenant == 0:
            text, end = await streamed(http, **body)
            return text or end["finish_reason"]
        response = await http.post("/v1/vqa", json=body, headers=tenants[tenant])
        return response.raise_for_status().json()["finish_reason"]

    assert all(await asyncio.gather(*(one(number) for number in range(32))))
    text = (await http.get("/metrics")).text
    for gauge in (
        'admitted_cost{unit="tokens"}',
        'resource_used{resource="llm"}',
        'requests_waiting{kind="follow_up"}',
    ):
        assert f"glimpse_{gauge} 0.0" in text


async def test_in_a_crowd_requests_look_less_closely_but_who_will_not(start_gateway, triton, scenes, card):
    url = triton.access.url
    settings = {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_ELASTIC_FIDELITY": "true"}
    settings |= {"GLIMPSE_FIDELITY_TARGET_S": "0.0001", "GLIMPSE_VISION_SLOTS": "1", "GLIMPSE_STALL_TIMEOUT_S": "30"}
    least, most = card.vision_tokens
    with start_gateway(settings) as gateway:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=60, limits=limits) as http:
            exact = {"budget": {"vision_tokens": [most, most]}}
            crowd = [
                answer(http, scene, QUESTIONS[0], **(exact if i % 4 == 0 else {}))
                for i, scene in enumerate(scenes[:24])
            ]
            said = [each["vision"] for each in await asyncio.gather(*crowd)]
            text = (await http.get("/metrics")).text
        reduced = [each for each in said if each["reduced"]]
        assert len(reduced) > len(said) / 4
        assert all(least <= each["vision_tokens"] <= 192 for each in reduced)
        assert {each["vision_tokens"] for each in said[::4]} == {most}
        assert not any(each["reduced"] for each in said[::4])
        assert f"glimpse_reduced_answers_total {len(reduced)}.0" in text
        assert "glimpse_fidelity_changes_total 0.0" not in text
    assert re.search(r"event=fidelity fidelity_level=1 ", gateway.log_path.read_text())


def a_clip(images: list[bytes]) -> bytes:
    """An animated WebP of these images, without loss."""
    pictures = [Pillow.open(BytesIO(image)).convert("RGB") for image in images]
    out = BytesIO()
    pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], duration=250, lossless=True)
    return out.getvalue()


async def test_a_clip_is_answered_and_asking_again_encodes_nothing(http, scenes, card):
    files, asked = {"video": a_clip(scenes[:4])}, {"question": QUESTIONS[0], "max_tokens": "8", "explain": "true"}
    said = (await http.post("/v1/vqa", files=files, data=asked)).raise_for_status().json()
    seen = said["vision"]["frames"]
    assert [(frame["index"], frame["time_s"]) for frame in seen] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert said["answer"]
    assert said["vision"]["cache"] == "miss"
    each = [tokens_at(np.array(frame["relevance"]["levels"])) for frame in seen]
    assert sum(each) == said["vision"]["vision_tokens"]
    visual = 4 * card.default_visual_tokens[0] if card.clip is None else card.clip.visual_tokens
    assert said["usage"]["image_tokens"] == visual
    again = {"video": said["video_id"], "question": QUESTIONS[1], "max_tokens": 8}
    told = (await http.post("/v1/vqa", json=again)).raise_for_status().json()
    assert told["vision"]["cache"] == "hit"
    assert told["video_id"] == said["video_id"]


async def test_frames_that_come_as_images_are_seen_as_those_of_a_file(http, scenes):
    kept = [(await http.post("/v1/images", content=image)).json()["id"] for image in scenes[4:8]]
    body = {"question": QUESTIONS[0], "max_tokens": 8}
    of_file = await http.post("/v1/vqa", files={"video": a_clip(scenes[4:8])}, data=body)
    of_images = await http.post("/v1/vqa", json=body | {"frames": kept})
    assert of_images.json()["answer"] == of_file.json()["answer"]
    assert [frame["image_id"] for frame in of_images.json()["vision"]["frames"]] == kept


async def test_of_a_clip_that_hardly_changes_few_frames_are_read(http, scenes):
    """Noise and JPEG's loss are no change, another scene is one."""
    grain = np.random.default_rng(3)
    images = []
    for scene in [scenes[10]] * 5 + [scenes[11]] * 3:
        pixels = np.asarray(Pillow.open(BytesIO(scene)).convert("RGB")) + grain.normal(0, 1.5, (224, 224, 3))
        out = BytesIO()
        Pillow.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
        images.append(out.getvalue())
    body = {"question": QUESTIONS[0], "max_tokens": "8", "video_sampling": "change"}
    said = (await http.post("/v1/vqa", files={"video": a_clip(images)}, data=body)).raise_for_status().json()
    assert [frame["index"] for frame in said["vision"]["frames"]] == [0, 5]


async def test_more_frames_than_fit_are_refused_with_how_many_do(http, scenes, card):
    if card.clip is not None:
        pytest.skip(f"{card.name} reads any number of frames in as many visual tokens")
    fits = (card.max_positions - 64) // 32
    body = {"question": QUESTIONS[0], "video_frames": "16"}
    refused = await http.post("/v1/vqa", files={"video": a_clip(scenes[:2])}, data=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "video_frames"
    told = int(re.search(r"(\d+) frames fit", refused.json()["error"]["message"])[1])
    assert fits - 2 <= told <= fits


async def test_each_page_of_a_pdf_is_answered_by_what_it_shows(http):
    """Scans of three scenes, as JPEG; the second is turned by its page."""
    scenes = {"new_009.webp": "yellow", "new_029.webp": "purple", "new_105.webp": "green"}
    scans = []
    for name in scenes:
        out = BytesIO()
        Pillow.open(SCENES / name).convert("RGB").save(out, "JPEG", quality=95)
        scans.append(out.getvalue())
    turned = BytesIO()
    Pillow.open(BytesIO(scans[1])).transpose(Pillow.Transpose.ROTATE_90).save(turned, "JPEG", quality=95)
    pages = [showing(scans[0]), replace(showing(turned.getvalue()), extra=b"/Rotate 90"), showing(scans[2])]
    kept = (await http.post("/v1/images", content=pdf(pages))).raise_for_status().json()
    assert kept["pages"] == 3
    said = [await answer(http, kept["id"], "what colour is the star?", page=page) for page in (1, 2, 3)]
    assert [each["answer"] for each in said] == list(scenes.values())
    assert (await answer(http, kept["id"], "what colour is the star?"))["answer"] == "yellow"
