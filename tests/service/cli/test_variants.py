"""`glimpse variants`: what it writes, what it lists, and how it refuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from service.upstreams.store import VariantsFile
from tests.service.cli.test_main import run


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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("weights", "next"), "is not a weight"),
        (("weights", "next=-1"), "is not a weight"),
        (("weights", "next=nan"), "is not a weight"),
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
