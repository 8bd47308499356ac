"""A key, its record, and the file and the Redis that hold them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import stat
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import pytest
from structlog.testing import capture_logs

from service.access.gate import Gate, NoGate
from service.access.key_file import KeyFile
from service.access.key_redis import KEYS, VERSION, KeysInRedis
from service.access.keys import (
    DIGEST,
    EXPIRED_KEY,
    NO_KEY,
    WRONG_KEY,
    KeyRecord,
    Keyring,
    KeysError,
    Limits,
    digest_of,
    id_of,
    new_key,
)
from service.app import grpc_edge, http_edge
from service.core.access import Grant, Scope
from service.core.errors import Unauthenticated, Unavailable
from service.system import files
from service.telemetry.metrics import Metrics
from tests.support.fakes import House, cancelled, until
from tests.support.keys import ASKING, Keys
from tests.support.samples import sample


def ring_of(*made: tuple[str, str, str], **fields: object) -> Keyring:
    told = {"tenant": "acme", "scopes": ASKING, "created_at": 1.0} | fields
    return Keyring.of((KeyRecord(id=key_id, sha256=digest, **told) for _, key_id, digest in made), {})


def test_a_key_has_256_random_bits_and_only_its_hash_is_kept():
    made = [new_key() for _ in range(20)]
    for key, key_id, digest in made:
        assert re.fullmatch(r"glk_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", key)
        assert key.split("_")[1] == key_id
        assert DIGEST.fullmatch(digest)
    assert len({key for key, _, _ in made}) == 20
    text = ring_of(*made).to_json().decode()
    assert not [key for key, _, _ in made if key[13:] in text]


def test_the_right_key_has_its_tenant_and_scopes():
    made = new_key()
    grant = ring_of(made).grant(made[0], now=5.0)
    assert (grant.tenant, grant.key, grant.scopes) == ("acme", made[1], ASKING)
    assert grant.allows(Scope.ASK)
    assert not grant.allows(Scope.METRICS)
    assert not grant.allows(Scope.ADMIN)


def test_admin_allows_everything():
    made = new_key()
    grant = ring_of(made, scopes=frozenset({Scope.ADMIN})).grant(made[0], now=5.0)
    assert all(grant.allows(scope) for scope in Scope)


def test_every_other_key_is_refused():
    made, other = new_key(), new_key()
    ring = ring_of(made)
    key = made[0]
    wrong = [
        other[0],
        key[:-1],
        key + "x",
        key.upper(),
        key.replace("glk", "GLK"),
        f"glk_{made[1]}_",
        made[1],
        "é",
        "_",
        "glk_\udc80",  # no text of UTF-8
    ]
    wrong += [f"glk_{made[1]}_{other[0][13:]}", " " + key, key * 10, made[2]]
    for each in wrong:
        with pytest.raises(Unauthenticated) as caught:
            ring.grant(each, now=5.0)
        assert caught.value.code == "invalid_api_key"
        assert each not in caught.value.message or len(each) < 3
    with pytest.raises(Unauthenticated) as caught:
        ring.grant("", now=5.0)
    assert caught.value.code == "missing_api_key"


def test_a_key_expires():
    made = new_key()
    ring = ring_of(made, expires_at=10.0)
    assert ring.grant(made[0], now=9.9).tenant == "acme"
    with pytest.raises(Unauthenticated) as caught:
        ring.grant(made[0], now=10.0)
    assert caught.value.code == "expired_api_key"


def test_a_document_is_read_as_it_was_written():
    made = [new_key() for _ in range(3)]
    ring = ring_of(*made, limits=Limits(requests_per_minute=5), note="a note", expires_at=7.5)
    ring = Keyring(ring.keys, {"acme": Limits(images_per_minute=2), "b": Limits(concurrent_requests=1)})
    assert Keyring.from_json(ring.to_json()) == ring


KEY = f'{{"id": "00000000", "sha256": "{digest_of("x")}", "tenant": "a", "scopes": ["ask"]}}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is not JSON"),
        ("[]", 'must be an object with "version": 1'),
        ('{"version": 2}', 'must be an object with "version": 1'),
        ('{"version": 1, "more": 1}', 'must be an object with "version": 1'),
        ('{"version": 1, "keys": {}}', "keys must be a list"),
        ('{"version": 1, "keys": [1]}', "keys.0 must be an object"),
        ('{"version": 1, "keys": [{}]}', "keys.0.id is None"),
        (f'{{"version": 1, "keys": [{KEY}, {KEY}]}}', "two keys have the id 00000000"),
        (f'{{"version": 1, "keys": [{KEY.replace("ask", "all")}]}}', "keys.0.scopes is"),
        (f'{{"version": 1, "keys": [{KEY.replace("scopes", "scope")}]}}', "keys.0 has no field 'scope'"),
        (
            f'{{"version": 1, "keys": [{KEY.replace("}", ", " + chr(34) + "expires_at" + chr(34) + ": true}")}]}}',
            "expires_at",
        ),
        ('{"version": 1, "tenants": {"a b": {}}}', "the tenant 'a b' must have"),
        ('{"version": 1, "tenants": {"a": {"requests": 1}}}', "tenants.a has no limit 'requests'"),
        ('{"version": 1, "tenants": {"a": {"requests_per_minute": 0}}}', "requests_per_minute is 0"),
        ('{"version": 1, "tenants": {"a": {"requests_per_minute": true}}}', "requests_per_minute is True"),
    ],
)
def test_a_wrong_document_says_where(text, said):
    with pytest.raises(KeysError, match=re.escape(said)):
        Keyring.from_json(text.encode())


def record(**fields: object) -> dict[str, object]:
    return {"id": "00000000", "sha256": "0" * 64, "tenant": "a", "scopes": ["ask"]} | fields


FIELDS = "created_at, expires_at, id, limits, note, scopes, sha256, tenant"
LIMITS = (
    "requests_per_minute, images_per_minute, visual_tokens_per_minute, generated_tokens_per_minute, concurrent_requests"
)
WHOLE = "write a whole number of at least 1, or null for none"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (record(more=1), f"keys.0 has no field 'more': the fields are {FIELDS}"),
        (record(id="x"), "keys.0.id is 'x': it must match [0-9a-f]{8}"),
        (record(scopes=["all"]), f"keys.0.scopes is ['all']: write a list of {', '.join(Scope)}"),
        (record(scopes=[]), f"keys.0.scopes is []: write a list of {', '.join(Scope)}"),
        (record(scopes={"ask": 1}), f"keys.0.scopes is {{'ask': 1}}: write a list of {', '.join(Scope)}"),
        (record(created_at=None), "keys.0.created_at is None: write seconds since the epoch"),
        (record(expires_at="1"), "keys.0.expires_at is '1': write seconds since the epoch"),
        (record(note=1), "keys.0.note must be a text"),
        (record(limits=[1]), f"keys.0.limits must be an object with some of {LIMITS}"),
        (record(limits={"requests": 1}), f"keys.0.limits has no limit 'requests': the limits are {LIMITS}"),
        (record(limits={"images_per_minute": 0}), f"keys.0.limits.images_per_minute is 0: {WHOLE}"),
    ],
)
def test_the_whole_message_is_for_the_operator(told, says):
    with pytest.raises(KeysError) as caught:
        Keyring.from_json(orjson.dumps({"version": 1, "keys": [told]}))
    assert str(caught.value) == says


@pytest.mark.parametrize("told", [{"keys": {}}, {"tenants": []}])
def test_keys_are_a_list_and_tenants_an_object(told):
    with pytest.raises(KeysError, match=r"^keys must be a list, and tenants an object$"):
        Keyring.from_json(orjson.dumps({"version": 1} | told))


def test_what_a_key_leaves_out_has_its_default_and_is_not_written():
    ring = Keyring.from_json(orjson.dumps({"version": 1, "keys": [record(limits={"images_per_minute": None})]}))
    assert ring.keys["00000000"] == KeyRecord(
        "00000000", "0" * 64, "a", frozenset({Scope.ASK}), created_at=0.0, expires_at=None, note="", limits=Limits()
    )
    written = record(created_at=0.0, expires_at=None, note="")
    assert orjson.loads(ring.to_json()) == {"version": 1, "keys": [written], "tenants": {}}
    assert ring.to_json().startswith(b'{\n  "version": 1,\n')
    assert ring.to_json().endswith(b"}\n")


def test_a_tenants_limits_replace_the_defaults_one_by_one():
    ring = Keyring({}, {"acme": Limits(requests_per_minute=5)})
    defaults = Limits(requests_per_minute=100, images_per_minute=10)
    assert ring.limits("acme", "", defaults) == (Limits(requests_per_minute=5, images_per_minute=10), Limits())
    assert ring.limits("other", "", defaults) == (defaults, Limits())


async def test_the_file_is_its_owners_and_is_replaced_in_one_step(tmp_path: Path):
    file = KeyFile(tmp_path / "in" / "keys.json")
    assert await file.loaded() == Keyring()
    made = [new_key() for _ in range(8)]
    await asyncio.gather(
        *(
            asyncio.to_thread(
                asyncio.run, file.change(lambda ring, each=each: Keyring({**ring.keys, **ring_of(each).keys}))
            )
            for each in made
        )
    )
    assert set(KeyFile(file.path).read().keys) == {key_id for _, key_id, _ in made}
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert not [path for path in file.path.parent.iterdir() if path.suffix not in (".json", ".lock")]


async def test_a_lock_that_another_program_keeps_ends_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "LOCK_S", 0.05)
    file = KeyFile(tmp_path / "keys.json")
    await file.change(lambda before: before)
    with file.path.with_name(".keys.json.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(KeysError, match=r"keys\.json is locked by another command: try again"):
            await file.change(lambda _: Keyring())
    await file.change(lambda before: before)


async def test_a_change_of_the_file_is_noticed_and_a_bad_file_changes_nothing(tmp_path: Path):
    keys = Keys(tmp_path)
    first = keys.make("acme")
    source = KeyFile(keys.path)
    metrics = Metrics()
    gate = Gate(source, metrics, first=source.read())
    second = keys.make("beta")
    with pytest.raises(Unauthenticated):
        gate.grant(second)
    with capture_logs() as logs:
        await gate.look()
    assert logs == [{"event": "keys_in_use", "log_level": "info", "keys": 2}]
    assert gate.grant(second).tenant == "beta"
    assert sample(metrics, "glimpse_keys") == 2
    keys.path.write_text("{")
    with capture_logs() as logs:
        await gate.look()
        await gate.look()
    assert [(line["event"], line["in_use"]) for line in logs] == [("keys_not_read", 2)]
    assert gate.grant(first).tenant == "acme"
    assert sample(metrics, "glimpse_keys_readable") == 0
    keys.path.unlink()
    await gate.look()
    assert gate.grant(first).tenant == "acme"
    keys.write(Keyring())
    await gate.look()
    with pytest.raises(Unauthenticated):
        gate.grant(first)
    assert sample(metrics, "glimpse_keys_readable") == 1


async def test_changes_at_the_same_time_all_count_in_redis(redis_server):
    def limited(ring: Keyring, **more: int) -> Keyring:
        return replace(ring, tenants={"acme": Limits(**ring.tenants.get("acme", Limits()).told() | more)})

    names = [each.name for each in fields(Limits)]
    await asyncio.gather(
        *(KeysInRedis(redis_server.url).change(lambda ring, name=name: limited(ring, **{name: 7})) for name in names)
    )
    assert (await KeysInRedis(redis_server.url).loaded()).tenants == {"acme": Limits(7, 7, 7, 7, 7)}


class Source:
    """Keys that do not change, and that cannot be read while there is a fault."""

    fault: Exception | None = None

    async def changed(self) -> Keyring | None:
        if self.fault is not None:
            raise self.fault
        return None

    async def run(self) -> None: ...


async def test_keys_that_can_be_read_again_and_did_not_change_meanwhile_are_told_as_readable_once():
    source, metrics = Source(), Metrics()
    gate = Gate(source, metrics, first=Keyring())
    readable = [sample(metrics, "glimpse_keys_readable")]
    with capture_logs() as logs:
        for source.fault in (None, KeysError("gone"), KeysError("gone"), KeysError("not JSON"), None, None):
            await gate.look()
            readable.append(sample(metrics, "glimpse_keys_readable"))
    assert readable == [1, 1, 0, 0, 0, 1, 1]
    not_read = {"event": "keys_not_read", "log_level": "warning", "in_use": 0}
    assert logs == [
        not_read | {"reason": "gone"},
        not_read | {"reason": "not JSON"},
        {"event": "keys_read_again", "log_level": "info"},
    ]


def test_the_gate_refuses_by_its_clock_and_counts_why():
    now, metrics, made = [9.0], Metrics(), new_key()
    gate = Gate(Source(), metrics, first=ring_of(made, expires_at=10.0), clock=lambda: now[0])
    assert gate.grant(made[0]).tenant == "acme"
    now[0] = 10.0
    for key, code, says in (
        (made[0], "expired_api_key", EXPIRED_KEY),
        ("", "missing_api_key", NO_KEY),
        ("glk_", "invalid_api_key", WRONG_KEY),
    ):
        with pytest.raises(Unauthenticated) as caught:
            gate.grant(key)
        assert (caught.value.code, caught.value.message) == (code, says)
        assert sample(metrics, "glimpse_keys_refused_total", {"code": code}) == 1


def test_before_the_keys_were_read_nobody_is_let_in():
    with pytest.raises(Unavailable) as caught:
        Gate(Source(), Metrics()).grant("glk_00000000_")
    assert caught.value.message == "the API keys have not been read yet: try again in a few seconds"


async def test_what_is_in_use_is_told_if_no_keys_were_ever_read():
    source = Source()
    source.fault = KeysError("gone")
    with capture_logs() as logs:
        await Gate(source, Metrics()).look()
    assert logs == [{"event": "keys_not_read", "log_level": "warning", "reason": "gone", "in_use": 0}]


def test_without_keys_everyone_is_let_in_as_nobody():
    assert NoGate().grant("whatever") == Grant("")


def test_only_a_well_formed_key_names_an_id():
    assert id_of("glk_00000000_secret") == "00000000"
    assert [id_of(each) for each in ("", "glk", "xyz_00000000_secret")] == [""] * 3


async def test_a_fault_of_our_own_does_not_end_the_looks_for_keys():
    source, metrics = Source(), Metrics()
    source.fault = RuntimeError("can't start new thread")
    gate = Gate(source, metrics, first=Keyring())
    with capture_logs() as logs:
        running = asyncio.create_task(gate.run())
        await until(lambda: logs)
        source.fault = KeysError("gone")
        await until(lambda: sample(metrics, "glimpse_keys_readable") == 0)
        await cancelled(running)
    assert [line["event"] for line in logs] == ["watch_failed", "keys_not_read"]
    assert logs[0]["watch"] == "keys"


async def test_keys_that_were_made_again_in_an_emptied_redis_are_noticed(redis_server):
    """As many changes were made as before, so that a counter of them would be the same."""
    source = KeysInRedis(redis_server.url)
    running = asyncio.create_task(source.run())
    admin = KeysInRedis(redis_server.url)
    lost, made = ring_of(new_key()), ring_of(new_key())
    await admin.change(lambda _: lost)
    assert (await source.changed()).keys == lost.keys
    assert await source.changed() is None
    redis_server.client.flushall()  # no look comes before the next change
    await admin.change(lambda _: made)
    assert (await source.changed()).keys == made.keys
    redis_server.client.flushall()
    with pytest.raises(KeysError, match="no longer in Redis"):
        await source.changed()
    await admin.change(lambda _: lost)
    assert (await source.changed()).keys == lost.keys
    redis_server.client.incr(VERSION)  # a command of another release counts
    assert (await source.changed()).keys == lost.keys
    await cancelled(running)


async def test_keys_in_redis_are_read_when_they_change_and_outlive_it(redis_server):
    source = KeysInRedis(redis_server.url)
    gate = Gate(source, Metrics())
    with pytest.raises(Unavailable):
        gate.grant("glk_00000000_")
    running = asyncio.create_task(gate.run())
    made = new_key()
    admin = KeysInRedis(redis_server.url)
    await admin.change(lambda ring: Keyring({**ring.keys, **ring_of(made).keys}, {"acme": Limits(images_per_minute=3)}))

    def knows() -> bool:
        try:
            return gate.grant(made[0]).tenant == "acme"
        except (Unauthenticated, Unavailable):
            return False

    await until(knows)
    assert (await admin.loaded()).tenants == {"acme": Limits(images_per_minute=3)}
    assert not [value for value in redis_server.client.hgetall(KEYS).values() if made[0][13:].encode() in value]
    redis_server.client.flushall()
    await gate.look()
    assert knows()  # the last ones stay in use
    redis_server.kill()
    await gate.look()
    assert knows()
    redis_server.start()
    other = new_key()
    await admin.change(lambda ring: Keyring({**ring.keys, **ring_of(other).keys}))
    await until(lambda: not knows())
    assert gate.grant(other[0]).tenant == "acme"
    await cancelled(running)


CHANGE_AS_ANOTHER = """
import asyncio, concurrent.futures.thread, os, sys
from pathlib import Path
from service.access.key_file import KeyFile
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
asyncio.run(KeyFile(Path(sys.argv[1])).change(lambda ring: ring))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_the_owner_of_the_keys_changes_them_after_root_did():
    with TemporaryDirectory() as folder:  # pytest's folders are this user's alone
        os.chown(folder, 65534, 65534)
        path = Path(folder) / "keys.json"
        path.write_bytes(Keyring().to_json())
        os.chown(path, 65534, 65534)
        asyncio.run(KeyFile(path).change(lambda ring: ring))
        command = [sys.executable, "-c", CHANGE_AS_ANOTHER, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert path.stat().st_uid == 65534


class Unreachable:
    """A source whose keys cannot be read at first."""

    fails = True

    async def changed(self) -> Keyring | None:
        if self.fails:
            raise KeysError("Redis does not answer")
        return Keyring()

    async def run(self) -> None: ...


async def test_a_service_is_not_ready_until_its_keys_were_read():
    source, house = Unreachable(), House()
    gate = Gate(source, house.metrics)
    for model in house.readiness.faults:
        house.readiness.set(model, "")
    edges = [
        make(house.pipeline, house.readiness, house.settings, house.metrics, access=gate)
        for make in (http_edge, grpc_edge)
    ]
    await gate.look()
    assert [dict(edge.faults()) for edge in edges] == [{"keys": "the API keys have not been read yet"}] * 2
    source.fails = False
    await gate.look()
    assert [dict(edge.faults()) for edge in edges] == [{}, {}]
    source.fails = True
    await gate.look()  # the last ones stay in use
    assert [dict(edge.faults()) for edge in edges] == [{}, {}]
    house.reader.close()
