"""`glimpse variants`: what it writes, what it lists, and how it refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.core.access import Scope
from service.core.errors import NotFound
from service.core.variant import VariantsChange
from service.upstreams.store import VariantsFile
from tests.service.cli.conftest import serving
from tests.service.cli.test_main import run
from tests.service.edges.http.test_variants import FakeControl
from tests.support.fakes import House
from tests.support.keys import Keys


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, str]:
    """The option that names a file with two variants, 95 to 5."""
    option = ("--variants", str(tmp_path / "variants.json"))
    for name, triton, weight in (("stable", "a:8001", "95"), ("next", "c:8001", "5")):
        added = ("add", name, "--models", f"/models/{name}", "--triton", triton, "--weight", weight)
        assert run("variants", *added, *option)[0] == 0
    return option


def written(place: tuple[str, str]) -> dict[str, tuple[float, bool]]:
    """By name, the weight and whether the variant is draining."""
    found = asyncio.run(VariantsFile(Path(place[1])).loaded()).variants
    return {name: (each.weight, each.is_draining) for name, each in found.items()}


def test_what_is_added_is_written_and_listed(place):
    assert written(place) == {"stable": (95, False), "next": (5, False)}
    status, said, _ = run("variants", "list", *place)
    assert status == 0
    stable, following = said.splitlines()
    assert stable.startswith("stable")
    assert "95" in stable
    assert "a:8001" in stable
    assert following.startswith("next")


def test_a_precision_is_kept_and_listed(place):
    added = run("variants", "add", "rounded", "--models", "/m", "--triton", "c:1", "--precision", "int8", *place)
    assert added[1].splitlines()[-1].endswith("models /m  int8")
    assert asyncio.run(VariantsFile(Path(place[1])).loaded()).variants["rounded"].precision == "int8"


def test_weights_change_and_others_keep_theirs(place):
    assert run("variants", "weights", "next=20", *place)[0] == 0
    assert written(place) == {"stable": (95, False), "next": (20, False)}


def test_a_variant_drains_comes_back_and_goes(place):
    assert run("variants", "drain", "next", *place)[0] == 0
    assert written(place)["next"][1]
    assert run("variants", "drain", "next", "--undo", *place)[0] == 0
    assert not written(place)["next"][1]
    assert run("variants", "remove", "next", *place)[0] == 0
    assert set(written(place)) == {"stable"}


def test_a_variant_that_gets_other_models_keeps_its_weight_and_drains_on(place):
    assert run("variants", "drain", "next", *place)[0] == 0
    for name in ("stable", "next"):
        assert run("variants", "add", name, "--models", "/models/9", "--triton", "c:8001", *place)[0] == 0
    assert written(place) == {"stable": (95, False), "next": (5, True)}
    assert (
        run("variants", "add", "next", "--models", "/models/9", "--triton", "c:8001", "--weight", "7", *place)[0] == 0
    )
    assert written(place)["next"] == (7, True)


def test_the_last_variant_that_gets_questions_stays(place):
    assert run("variants", "drain", "next", *place)[0] == 0
    before = written(place)
    for arguments in (("remove", "stable"), ("add", "stable", "--models", "/m", "--triton", "a:1", "--weight", "0")):
        status, said, error = run("variants", *arguments, *place)
        assert (status, said, error.count("\n")) == (1, "", 1)
        assert "only stable gets questions" in error
        assert written(place) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("weights", "next"), "is not a weight"),
        (("weights", "next=-1"), "is not a weight"),
        (("weights", "next=nan"), "is not a weight"),
        (("weights", "next=2000000"), "the weight of next must be a number from 0 to 1,000,000"),
        (("weights", "stable=0", "next=0"), "leave one of them a weight above 0, such as stable=100"),
        (("weights", "nobody=1"), "nobody"),
        (("drain", "nobody"), "nobody"),
        (("remove", "nobody"), "nobody"),
        (("add", "two words", "--models", "/m", "--triton", "a:1"), "two words"),
        (
            ("add", "next", "--models", "/m", "--triton", "a:1", "--precision", "fp8"),
            "precision of next must be one of",
        ),
        (("add", "next", "--models", "/m", "--triton", "a:70000"), "must be a list of gRPC addresses"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_and_changes_nothing(place, arguments, told):
    before = written(place)
    status, said, error = run("variants", *arguments, *place)
    assert (status, said, error.count("\n")) == (1, "", 1)
    assert told in error
    assert written(place) == before


def test_a_file_that_is_none_and_a_redis_that_is_not_there_are_told_in_one_line(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text(json.dumps([1]))
    for options in (
        ("--variants", str(tmp_path / "bad.json")),
        ("--variants", str(tmp_path / "list.json")),
        ("--variants", "redis", "--redis-url", "redis://127.0.0.1:1"),
        ("--variants", "redis", "--redis-url", "http://127.0.0.1:1"),
    ):
        status, said, error = run("variants", "list", *options)
        assert (status, said, error.count("\n")) == (1, "", 1), options


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A service with variants, and the key of an administrator in the environment."""
    keys = Keys(tmp_path)
    monkeypatch.setenv("GLIMPSE_API_KEY", keys.make("ops", frozenset({Scope.ADMIN})))
    asker = keys.make("acme")
    house = House(keys=str(keys.path))
    control = FakeControl()
    house.edge = replace(house.edge, variants=control)
    with serving(house) as server:
        yield SimpleNamespace(option=("--url", server.url), control=control, asker=asker)


def test_a_gateway_is_asked_in_place_of_the_file(remote, place):
    status, said, error = run("variants", "list", *remote.option)
    assert (status, error) == (0, "")
    assert said.splitlines() == [
        "stable  weight 95 (95.0 %)  2 Tritons (1 out)  3 in flight here  model tiny",
        "next  drains  0 Tritons  0 in flight here",
    ]
    before = written(place)
    assert run("variants", "weights", "stable=50", "next=0.5", *remote.option, *place)[1] == said
    assert run("variants", "drain", "next", *remote.option)[1] == said
    assert run("variants", "drain", "next", "--undo", *remote.option)[1] == said
    assert [change for change, _ in remote.control.asked] == [
        VariantsChange({"stable": 50, "next": 0.5}),
        VariantsChange({}, {"next": True}),
        VariantsChange({}, {"next": False}),
    ]
    assert written(place) == before


def test_a_gateway_whose_states_have_other_fields_is_told_in_one_line():
    """Another version, or another service that has the path."""
    state = {"name": "stable", "weight": 95.0, "share": 1.0, "draining": False, "tritons": 2, "tritons_out": 0}
    right = state | {"in_flight": 3}
    for told in (
        [],
        {"data": None},
        {"data": ["stable"]},
        {"data": [state]},
        {"data": [right, right | {"weight": "95"}]},
        {"data": [right | {"share": "1"}]},
        {"data": [right | {"name": 7}]},
    ):
        with answering(json.dumps(told).encode()) as url:
            for command in (("list",), ("weights", "next=1"), ("drain", "next")):
                status, said, error = run("variants", *command, "--url", url)
                assert (status, said, error.count("\n")) == (1, "", 1), (told, error)
                assert "does not answer as this version of Glimpse does" in error
    with answering(b'{"data": []}') as url:
        assert run("variants", "list", "--url", url)[:2] == (0, "no variants\n")


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    """Some service, which answers every request with this body."""

    class Answerer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answerer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_gateway_that_refuses_is_told_in_one_line(remote, monkeypatch):
    remote.control.fault = NotFound("there is no variant 'nxt'", code="unknown_variant")
    status, said, error = run("variants", "weights", "nxt=1", *remote.option)
    assert (status, said, error) == (1, "", "glimpse: there is no variant 'nxt'\n")
    monkeypatch.setenv("GLIMPSE_API_KEY", remote.asker)
    for command in (("list",), ("weights", "next=1"), ("drain", "next")):
        status, said, error = run("variants", *command, *remote.option)
        assert (status, said, error.count("\n")) == (1, "", 1)
        assert "no scope admin" in error
    assert run("variants", "list", "--url", "http://127.0.0.1:1")[2].startswith("glimpse: nothing answers at")
