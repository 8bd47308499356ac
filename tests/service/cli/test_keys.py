"""`glimpse keys`, and the key that other commands send."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.access.key_file import KeyFile
from service.access.keys import KeyRecord, Limits
from service.cli.client import AskFailed, connected
from service.cli.keys import day
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


@pytest.mark.parametrize("days", ["nan", "inf", "1e7", "-1"])
def test_a_key_whose_end_is_no_time_is_not_made(path, days):
    status, _, told = run("keys", "create", "--tenant", "acme", "--days", days, "--keys", path)
    assert (status, "Invalid value for '--days'" in told) == (2, True)
    assert not Path(path).exists()


def test_a_key_that_ends_after_all_calendars_is_listed(path):
    """An earlier release made such keys."""
    _, record = created(path, "--tenant", "acme", "--days", "36525")
    Path(path).write_text(Path(path).read_text().replace(str(record.expires_at), "1e12"))
    status, said, _ = run("keys", "list", "--keys", path)
    assert (status, "expires after the year 9999" in said) == (0, True)
    for seconds, word in ((-1e12, "before the year 1"), (float("inf"), "after the year 9999"), (1e300, "after the")):
        assert word in day(seconds)


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "create", "--tenant", "acme", "--note", "\udcff"),
        ("keys", "list", "--redis-url", "redis://\udcff"),
        ("variants", "add", "new", "--models", "\udcff", "--triton", "a:1"),
        ("variants", "add", "new", "--models", "m", "--triton", "unix:\udcff"),
        ("variants", "add", "new", "--models", "m", "--vision", "unix:\udcff", "--llm", "a:1"),
        ("variants", "weights", "\udcff=1", "--url", "http://127.0.0.1:1"),
        ("variants", "drain", "\udcff", "--url", "http://127.0.0.1:1"),
        ("eval", "--prompt", "\udcff"),
        ("triton", "--host", "\udcff"),
    ],
)
def test_a_text_that_no_document_holds_is_told(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, told = run(*arguments)
    assert status == 2
    assert "udcff" in told
    assert "is not UTF-8 text" in told
    assert not list(tmp_path.iterdir())


def test_a_key_is_revoked(path):
    _, kept = created(path, "--tenant", "acme")
    _, gone = created(path, "--tenant", "acme")
    assert run("keys", "revoke", gone.id, "--keys", path) == (0, f"{gone.id} is revoked\n", "")
    assert KeyFile(Path(path)).read().keys.keys() == {kept.id}
    status, _, told = run("keys", "revoke", gone.id, "--keys", path)
    assert status == 1
    assert f"there is no key with the id '{gone.id}'" in told


@pytest.mark.parametrize("in_redis", [False, True])
def test_a_tenants_limits_are_set_and_unset_one_by_one(path, in_redis, request):
    place = ("--keys", path)
    if in_redis:
        place = ("--keys", "redis", "--redis-url", request.getfixturevalue("redis_server").url)

    def limited(*options: str) -> str:
        status, said, _ = run("keys", "limit", "acme", *options, *place)
        assert status == 0
        assert run("keys", "list", *place)[1].removesuffix("no keys\n") in (f"tenant {said}", "")
        return said.removeprefix("acme: ").strip()

    assert limited("--requests", "100") == "100 requests per minute"
    assert limited("--images", "50") == "100 requests per minute, 50 images per minute"
    assert limited("--requests", "7", "--concurrent", "1").startswith("7 requests per minute, 50 images")
    assert limited("--requests", "none") == "50 images per minute, 1 concurrent requests"
    assert limited("--images", "none", "--concurrent", "NONE", "--requests", "none") == "the defaults"
    assert limited("--requests", "8") == "8 requests per minute"
    assert limited() == "the defaults"
    assert run("keys", "list", *place)[1] == "no keys\n"


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "many", "1" + 30 * "0", "٣x"])
def test_a_limit_that_is_none_is_told(path, word):
    status, _, told = run("keys", "limit", "acme", "--requests", word, "--keys", path)
    assert (status, "write a whole number from 1" in told.replace("\n", " ")) == (2, True)
    assert not Path(path).exists()
    if word != "1.5":
        assert run("keys", "create", "--tenant", "acme", "--requests", word, "--keys", path)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--tenant", "two words"), "the tenant 'two words' must have 1 to 64 letters"),
        (("list", "--keys", "redis"), "name the Redis with --redis-url, GLIMPSE_REDIS_URL or GLIMPSE_REDIS_URL_FILE"),
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


def test_the_address_of_redis_may_stand_in_a_file(redis_server, tmp_path, monkeypatch):
    """As in the pods of gateways, which have no other."""
    monkeypatch.delenv("GLIMPSE_REDIS_URL", raising=False)
    secret = tmp_path / "url"
    secret.write_text(f"{redis_server.url}\n")
    monkeypatch.setenv("GLIMPSE_REDIS_URL_FILE", str(secret))
    assert run("keys", "list", "--keys", "redis")[:2] == (0, "no keys\n")
    assert run("variants", "list", "--variants", "redis")[:2] == (0, "no variants\n")
    assert run("cache", "purge")[:2] == (0, "0 views of images deleted\n")
    assert run("cache", "stats")[0] == 0
    assert run("cache", "stats", "--redis-url", "http://x")[2].startswith("glimpse: --redis-url: ")  # it comes first
    monkeypatch.setenv("GLIMPSE_REDIS_URL", redis_server.url)
    assert "are both set: unset one of them" in run("cache", "stats")[2]
    monkeypatch.delenv("GLIMPSE_REDIS_URL")
    secret.unlink()
    assert f"GLIMPSE_REDIS_URL_FILE: {secret} cannot be read" in run("keys", "list", "--keys", "redis")[2]
    monkeypatch.delenv("GLIMPSE_REDIS_URL_FILE")
    assert run("cache", "stats")[0::2] == (
        1,
        "glimpse: name the Redis with --redis-url, GLIMPSE_REDIS_URL or GLIMPSE_REDIS_URL_FILE\n",
    )


def test_commands_send_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("GLIMPSE_API_KEY", " glk_1 ")
    assert connected("http://127.0.0.1:1").headers["authorization"] == "Bearer glk_1"
    monkeypatch.setenv("GLIMPSE_API_KEY", "glk_é")
    with pytest.raises(AskFailed, match="GLIMPSE_API_KEY has characters that no key has") as caught:
        connected("http://127.0.0.1:1")
    assert "glk_" not in str(caught.value)
    monkeypatch.delenv("GLIMPSE_API_KEY")
    assert "authorization" not in connected("http://127.0.0.1:1").headers
