"""`glimpse keys`, and the key that other commands send."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.access.key_file import KeyFile
from service.access.keys import KeyRecord, Limits
from service.cli.client import AskFailed, connected
from service.core.access import Scope
from tests.service.cli.test_main import run

SHOWN = re.compile(r"(glk_([0-9a-f]{8})_[A-Za-z0-9_-]{43})\n")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def created(path: str, *arguments: str) -> tuple[str, KeyRecord]:
    status, said, told = run("keys", "create", "--keys", path, *arguments)
    assert (status, told[:12]) == (0, "This is the ")
    shown = SHOWN.fullmatch(said)
    assert shown is not None
    return shown[1], KeyFile(Path(path)).read().keys[shown[2]]


def test_a_key_is_shown_once_and_may_ask_and_upload(path):
    key, record = created(path, "--tenant", "acme")
    assert KeyFile(Path(path)).read().grant(key, 0.0).tenant == "acme"
    assert (record.scopes, record.expires_at, record.limits) == ({Scope.ASK, Scope.UPLOAD}, None, Limits())
    status, listed, _ = run("keys", "list", "--keys", path)
    assert status == 0
    assert record.id in listed
    assert key[13:] not in listed + Path(path).read_text()


def test_a_key_has_what_it_was_given(path):
    limits = (
        "--requests",
        "5",
        "--images",
        "4",
        "--visual-tokens",
        "3",
        "--generated-tokens",
        "2",
        "--concurrent",
        "1",
    )
    _, record = created(path, "--tenant", "ops", "--scope", "metrics", "--days", "2", "--note", "prometheus", *limits)
    assert (record.tenant, record.scopes, record.note) == ("ops", {Scope.METRICS}, "prometheus")
    assert record.expires_at == pytest.approx(record.created_at + 2 * 86_400)
    assert record.limits == Limits(5, 4, 3, 2, 1)
    _, listed, _ = run("keys", "list", "--keys", path)
    assert "5 requests per minute" in listed


@pytest.mark.parametrize(
    ("days", "status", "why"),
    [("nan", 2, "greater than or equal to 0"), ("inf", 1, "--days is inf: give a finite number")],
)
def test_a_key_whose_end_is_no_time_is_not_made(path, days, status, why):
    found, _, told = run("keys", "create", "--tenant", "acme", "--days", days, "--keys", path)
    assert (found, why in told) == (status, True)
    assert not Path(path).exists()


def test_a_key_is_revoked(path):
    _, kept = created(path, "--tenant", "acme")
    _, gone = created(path, "--tenant", "acme")
    assert run("keys", "revoke", gone.id, "--keys", path) == (0, f"{gone.id} is revoked\n", "")
    assert KeyFile(Path(path)).read().keys.keys() == {kept.id}
    status, _, told = run("keys", "revoke", gone.id, "--keys", path)
    assert status == 1
    assert f"there is no key with the id '{gone.id}'" in told


def test_a_tenants_limits_are_set_and_unset(path):
    assert run("keys", "limit", "acme", "--requests", "100", "--keys", path)[0] == 0
    assert KeyFile(Path(path)).read().tenants == {"acme": Limits(requests_per_minute=100)}
    assert run("keys", "limit", "acme", "--keys", path) == (0, "acme: the defaults\n", "")
    assert KeyFile(Path(path)).read().tenants == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--tenant", "two words"), "the tenant 'two words' must have 1 to 64 letters"),
        (("list", "--keys", "redis"), "name the Redis with --redis-url or GLIMPSE_REDIS_URL"),
        (("list", "--keys", "redis", "--redis-url", "redis://127.0.0.1:1/0"), "Redis: "),
        (("list", "--keys", "redis", "--redis-url", "http://x"), "--redis-url: "),
    ],
)
def test_what_is_wrong_is_one_line(path, arguments, said):
    where = () if "--keys" in arguments else ("--keys", path)
    status, _, told = run("keys", *arguments, *where)
    assert status == 1
    assert said in told
    assert told.count("\n") == 1


def test_keys_are_kept_in_redis(redis_server):
    place = ("--keys", "redis", "--redis-url", redis_server.url)
    _, said, _ = run("keys", "create", "--tenant", "acme", *place)
    shown = SHOWN.fullmatch(said)
    assert shown is not None
    assert shown[2] in run("keys", "list", *place)[1]
    assert run("keys", "revoke", shown[2], *place)[0] == 0
    assert run("keys", "list", *place)[1] == "no keys\n"


def test_commands_send_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("GLIMPSE_API_KEY", " glk_1 ")
    assert connected("http://127.0.0.1:1").headers["authorization"] == "Bearer glk_1"
    monkeypatch.setenv("GLIMPSE_API_KEY", "glk_é")
    with pytest.raises(AskFailed, match="GLIMPSE_API_KEY has characters that no key has") as caught:
        connected("http://127.0.0.1:1")
    assert "glk_" not in str(caught.value)
    monkeypatch.delenv("GLIMPSE_API_KEY")
    assert "authorization" not in connected("http://127.0.0.1:1").headers
