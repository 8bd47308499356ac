"""Every door of a service with keys: which scope it demands, and that another tenant's image is behind none of them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from service.core.access import Scope
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.http.application import http_api
from service.edges.http.batch import LINES
from tests.service.edges.grpc.test_batch import results_of
from tests.support import films
from tests.support.calls import Service, chunks, failure, question, served, streamed
from tests.support.fakes import CARD, House, png
from tests.support.keys import Keys, bearer

ROUTES = {"vertex_predict_route": "/predict", "vertex_health_route": "/alive"}
# The scope of each path that the application has: None for any key, "" for no key. A new one is added here on purpose.
SCOPES: dict[str, Scope | str | None] = {
    "/v1/vqa": Scope.ASK,
    "/v1/vqa/batch": Scope.ASK,
    "/v1/vqa/estimate": Scope.ASK,
    "/v1/vqa/predict": Scope.ASK,
    "/predict": Scope.ASK,  # Vertex AI's name of the one before
    "/v1/chat/completions": Scope.ASK,
    "/v1/images": Scope.UPLOAD,
    "/v1/images/{image_id}": Scope.UPLOAD,
    "/v1/files": Scope.UPLOAD,
    "/v1/files/{file_id}": Scope.UPLOAD,
    "/v1/models": None,
    "/v1/models/{model}": None,
    "/v1/variants": Scope.ADMIN,
    "/metrics": Scope.METRICS,
    "/health/live": "",
    "/health/ready": "",
    "/alive": "",
    "/": "",
    "/page/{name}": "",
    "/docs": "",
    "/docs/redoc.standalone.js": "",
    "/docs/swagger-ui-bundle.js": "",
    "/docs/swagger-ui.css": "",
    "/redoc": "",
    "/openapi.json": "",
}
RPC_SCOPES = {"Answer": Scope.ASK, "StreamAnswer": Scope.ASK, "Batch": Scope.ASK, "PutImage": Scope.UPLOAD}
UNKNOWN = "img_" + "0" * 32


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest_asyncio.fixture
async def house(keys: Keys) -> House:
    return House(keys=str(keys.path), share_features=True, **ROUTES)  # sharing features opens no door either


@asynccontextmanager
async def calling(house: House) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(http_api(house.edge))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield http


def paths_of(routes: Iterable[object]) -> set[str]:
    """The paths of all routes, those that the description leaves out too. FastAPI holds a router as one route."""
    found: set[str] = set()
    for route in routes:
        inner = getattr(route, "original_router", None)
        found |= paths_of(inner.routes) if inner is not None else {route.path}
    return found


async def test_every_route_demands_its_scope(house, keys):
    app = http_api(house.edge)
    assert paths_of(app.routes) | set(ROUTES.values()) == set(SCOPES)
    made = {scope: bearer(keys.make("acme", frozenset({scope}))) for scope in Scope}
    await house.gate.look()
    async with calling(house) as http:
        for path, needed in SCOPES.items():
            url = path.replace("{", "").replace("}", "")
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                anonymous = (await http.request(method, url)).status_code
                assert (anonymous == 401) is (needed != ""), (method, path)
                for scope, headers in made.items():
                    allowed = needed in (scope, None, "") or scope is Scope.ADMIN
                    status = (await http.request(method, url, headers=headers)).status_code
                    assert (status == 403) is not allowed, (method, path, scope)
    house.reader.close()


async def test_every_call_of_grpc_demands_its_scope(house, keys):
    methods = pb.DESCRIPTOR.services_by_name["VisualQuestionAnswering"].methods
    assert {method.name for method in methods} == set(RPC_SCOPES)
    made = {scope: metadata(keys.make("acme", frozenset({scope}))) for scope in Scope}
    await house.gate.look()
    async with served(house) as service:
        for method, needed in RPC_SCOPES.items():
            assert (await failure(call(service, method, ()))).code == "UNAUTHENTICATED", method
            for scope, told in made.items():
                if scope in (needed, Scope.ADMIN):
                    await call(service, method, told)
                else:
                    assert (await failure(call(service, method, told))).code == "PERMISSION_DENIED", (method, scope)


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def call(service: Service, method: str, told: tuple[tuple[str, str], ...]) -> object:
    stub = service.stub
    if method == "Answer":
        return await stub.Answer(question(), metadata=told)
    if method == "StreamAnswer":
        return await streamed(stub.StreamAnswer(question(), metadata=told))
    if method == "PutImage":
        return await stub.PutImage(chunks(png()), metadata=told)
    return await results_of(stub.Batch(iter([pb.BatchRequest(question=question())]), metadata=told))


# By door, what asks about an image by its id. Each answers 404, as for an id that nobody has.
Ask = Callable[[httpx.AsyncClient, str, dict[str, str]], Any]
FILE = base64.b64encode(png()).decode()


def vqa(path: str = "/v1/vqa", **fields: Any) -> Ask:
    def ask(http: httpx.AsyncClient, image: str, headers: dict[str, str]) -> Any:
        body = {"question": "what?", "image": image} | fields
        if "images" in fields:
            body = {"question": "what?", "images": [FILE, image]}
        return http.post(path, json=body, headers=headers)

    return ask


def chat(http: httpx.AsyncClient, image: str, headers: dict[str, str], *, turn: bool = False) -> Any:
    def user(text: str, url: str) -> dict[str, Any]:
        return {
            "role": "user",
            "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}],
        }

    here = f"data:image/png;base64,{FILE}"
    earlier = [user("what?", image), {"role": "assistant", "content": "a ring"}, user("and?", here)]
    messages = earlier if turn else [user("what?", image)]
    return http.post("/v1/chat/completions", json={"model": CARD.name, "messages": messages}, headers=headers)


DOORS: dict[str, Ask] = {
    "vqa": vqa(),
    "stream": vqa(stream=True),
    "images": vqa(images=True),
    "estimate": vqa("/v1/vqa/estimate"),
    "form": lambda http, image, headers: http.post(
        "/v1/vqa", files={"image": (None, image), "question": (None, "what?")}, headers=headers
    ),
    "batch": lambda http, image, headers: http.post(
        "/v1/vqa/batch", json=[{"question": "what?", "image": image}], headers=headers
    ),
    "lines": lambda http, image, headers: http.post(
        "/v1/vqa/batch",
        content=json.dumps({"question": "what?", "image": image}),
        headers=headers | {"content-type": LINES[0]},
    ),
    "predict": lambda http, image, headers: http.post(
        "/predict", json={"instances": [{"question": "what?", "image": image}]}, headers=headers
    ),
    "chat": chat,
    "chat's earlier turn": lambda http, image, headers: chat(http, image, headers, turn=True),
    "frames": lambda http, image, headers: http.post(
        "/v1/vqa", json={"question": "what?", "frames": [FILE, image]}, headers=headers
    ),
    "delete": lambda http, image, headers: http.delete(f"/v1/images/{image}", headers=headers),
    "delete a file": lambda http, image, headers: http.delete(f"/v1/files/{image}", headers=headers),
}


def error_of(said: httpx.Response) -> dict[str, Any]:
    """The one error of a response, of a batch's only line or of the only prediction."""
    body = json.loads(said.text.strip().splitlines()[0])
    body = body.get("predictions", [body])[0]
    assert "error" in body, said.text
    assert said.status_code == 404 or body.get("status", 404) == 404
    return dict(body["error"])


@pytest.mark.parametrize("door", DOORS)
async def test_another_tenants_image_is_behind_no_door(house, keys, door):
    ours, theirs = bearer(keys.make("acme")), bearer(keys.make("other"))
    admins = bearer(keys.make("ops", frozenset({Scope.ADMIN})))
    await house.gate.look()
    async with calling(house) as http:
        image = (await http.post("/v1/images", content=png(), headers=ours)).json()["id"]
        for headers in (theirs, admins):  # an administrator is a tenant too
            found, unknown = [error_of(await DOORS[door](http, each, headers)) for each in (image, UNKNOWN)]
            assert found["code"] == "image_not_found"
            assert found["message"].replace(image, UNKNOWN) == unknown["message"]
            assert found["param"] == unknown["param"]
        own = await DOORS[door](http, image, ours)
        assert own.status_code == 200, own.text
        assert '"error"' not in own.text
    house.reader.close()


@pytest.mark.parametrize("door", ["vqa", "chat"])
async def test_another_tenants_video_is_behind_no_door(house, keys, door):
    ours, theirs = bearer(keys.make("acme")), bearer(keys.make("other"))
    await house.gate.look()

    def ask(http: httpx.AsyncClient, video: str, headers: dict[str, str]) -> Any:
        if door == "vqa":
            body = {"question": "what?", "video": video, "video_frames": 2}
            return http.post("/v1/vqa", json=body, headers=headers)
        content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": "what?"}]
        body = {"model": CARD.name, "messages": [{"role": "user", "content": content}], "video_frames": 2}
        return http.post("/v1/chat/completions", json=body, headers=headers)

    async with calling(house) as http:
        video = (await ask(http, base64.b64encode(films.gif()).decode(), ours)).json()["video_id"]
        found, unknown = [error_of(await ask(http, each, theirs)) for each in (video, UNKNOWN)]
        assert found["code"] == "image_not_found"
        assert found["message"].replace(video, UNKNOWN) == unknown["message"]
        assert found["param"] == unknown["param"]
        own = await ask(http, video, ours)
        assert (own.status_code, own.json()["vision"]["cache"]) == (200, "hit")
    house.reader.close()


async def test_another_tenants_image_is_behind_no_call_of_grpc(house, keys):
    ours, theirs = metadata(keys.make("acme")), metadata(keys.make("other"))
    await house.gate.look()
    async with served(house) as service:
        image = (await service.stub.PutImage(chunks(png()), metadata=ours)).id
        turn = question()
        turn.turns.add(parts=question(image, "what?").parts, answer="a ring")
        for asked in (question(image, "what?"), question(png(), image, "what?"), turn):
            for ask in (
                service.stub.Answer,
                lambda request, **more: streamed(service.stub.StreamAnswer(request, **more)),
            ):
                failed = await failure(ask(asked, metadata=theirs))
                assert (failed.code, failed.reason) == ("NOT_FOUND", "image_not_found")
                await ask(asked, metadata=ours)
            batch = [pb.BatchRequest(question=asked)]
            (refused,) = (await results_of(service.stub.Batch(iter(batch), metadata=theirs))).values()
            assert (refused.error.status, refused.error.code) == (grpc.StatusCode.NOT_FOUND.value[0], "image_not_found")
            (answered,) = (await results_of(service.stub.Batch(iter(batch), metadata=ours))).values()
            assert answered.answer.answer
