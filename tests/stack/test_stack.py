"""docker-compose.yml as it is committed, under load and faults. The tests run in this order; the last takes it down."""

from __future__ import annotations

import base64
import collections
import math
import os
import re
import subprocess
import sys
import time

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.test_dashboards import committed, expressions
from tests.stack.conftest import EVERY_S, Stack
from tests.stack.load import Load
from tests.stack.test_images import QUESTION, SCENE
from tests.support.paths import PROJECT
from tests.support.prometheus import Prometheus
from tests.support.servers import eventually

OURS = ("gateway", "triton")
WEIGHED = 500  # requests
ALERT = "GlimpseReplicaMissing"
WITHOUT_DATA = {"glimpse-variants"}  # the stack has none; tests/deploy asks a gateway that does
LIMIT_S = 900  # from nothing built to an answer, and down: two idle cores take a third of it


def test_a_question_is_answered_through_the_load_balancer(
    stack: Stack, caller: httpx.Client, told: dict[str, str]
) -> None:
    said = caller.post("/v1/vqa", data={"question": QUESTION}, files={"image": SCENE.read_bytes()})
    assert said.status_code == 200, said.text
    assert said.json()["answer"] == "8"
    stack.took_s["to an answer"] = time.time() - float(os.environ["STACK_BEGAN"])
    told["from nothing built to an answer"] = f"{stack.took_s['to an answer']:.0f} s"
    told["up --wait"] = f"{stack.took_s['up --wait']:.0f} s"


def gateway_of(caller: httpx.Client) -> bytes:
    """The address in the balancer's cookie, which also has a time."""
    found = re.search(rb"[\d.]+:8080", base64.b64decode(caller.cookies["glimpse-gateway"].strip('"')))
    assert found is not None
    return found[0]


def test_a_client_with_the_cookie_finds_its_image_again_and_others_meet_both_gateways(caller: httpx.Client) -> None:
    image = caller.post("/v1/images", content=SCENE.read_bytes()).json()["id"]
    gateways = {gateway_of(caller)}
    for _ in range(6):
        assert caller.post("/v1/vqa", json={"image": image, "question": QUESTION}).json()["answer"] == "8"
    assert {gateway_of(caller)} == gateways
    for _ in range(20):
        caller.cookies.clear()
        caller.get("/health/ready")
        gateways.add(gateway_of(caller))
    assert len(gateways) == 2


def test_grpc_goes_through_the_load_balancer(stack: Stack) -> None:
    with grpc.insecure_channel(stack.rpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
        said = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert said.status == health_pb2.HealthCheckResponse.SERVING


def test_a_weight_of_ninety_to_ten_is_one_of_the_requests(stack: Stack, told: dict[str, str]) -> None:
    """One client: each of the balancer's threads takes turns by itself. No cookie: it would keep one gateway."""
    turns: collections.Counter[bytes] = collections.Counter()
    with httpx.Client(base_url=stack.weighing, timeout=10, trust_env=False) as client:
        for _ in range(WEIGHED):
            assert client.get("/v1/models").status_code == 200
            turns[gateway_of(client)] += 1
            client.cookies.clear()
    first, second = (address_of(stack, name) for name in stack.names("gateway"))
    assert turns.keys() == {first, second}
    told["requests by weights of 90 and 10"] = f"{turns[first]} and {turns[second]}"
    assert abs(turns[first] / WEIGHED - 0.90) <= 0.03


def address_of(stack: Stack, name: str) -> bytes:
    (network,) = stack.docker.inspect(name)["NetworkSettings"]["Networks"].values()
    return f"{network['IPAddress']}:8080".encode()


def test_containers_of_ours_have_no_rights_and_bounds(stack: Stack) -> None:
    for service in OURS:
        assert len(stack.names(service)) == 2
    for name in stack.names():
        found = stack.docker.inspect(name)
        host = found["HostConfig"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert not host["CapAdd"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["PidsLimit"] >= 512, name
        assert host["Memory"] > 0, name
        published = [each["HostIp"] for ports in (host["PortBindings"] or {}).values() for each in ports]
        assert set(published) <= {"127.0.0.1"}, name
        assert found["Config"]["User"].partition(":")[0] not in ("", "0"), name
    for name in [name for service in OURS for name in stack.names(service)]:
        assert stack.docker.inspect(name)["HostConfig"]["ShmSize"] == 64 << 20
        rights = stack.docker.said("exec", name, "grep", "^Cap\\(Eff\\|Prm\\|Bnd\\)", "/proc/1/status").split()[1::2]
        assert set(rights) == {"0" * 16}, name


def test_the_back_has_no_way_out(stack: Stack) -> None:
    project = stack.environment["COMPOSE_PROJECT_NAME"]
    assert stack.docker.inspect(f"{project}_back")["Internal"]
    for service in ("gateway", "triton", "redis"):
        for name in stack.names(service):
            assert list(stack.docker.inspect(name)["NetworkSettings"]["Networks"]) == [f"{project}_back"]


def test_prometheus_reads_every_gateway_every_triton_and_the_balancer(stack: Stack) -> None:
    def up() -> dict[str, int]:
        answer = httpx.get(f"{stack.prometheus}/api/v1/query", params={"query": "up == 1"}, timeout=5, trust_env=False)
        jobs = [series["metric"]["job"] for series in answer.json()["data"]["result"]]
        return {job: jobs.count(job) for job in ("glimpse", "triton", "balancer")}

    eventually(lambda: up() == {"glimpse": 2, "triton": 2, "balancer": 1}, 180, "all targets up", EVERY_S)


def test_a_killed_gateway_takes_only_its_own_requests(stack: Stack) -> None:
    stack.wait_until_whole()
    gateway = stack.names("gateway")[0]
    with Load(stack.url) as load:
        killed = time.monotonic()
        stack.docker.run("kill", gateway)
        dead = time.monotonic()
        load.wait_for(32)
        stack.docker.run("start", gateway)
        stack.docker.wait_until_healthy(gateway)
        load.wait_for(16)
    assert [each for each in load.faults if not (each.began <= dead and each.ended >= killed)] == []
    assert len(load.faults) <= 8


def test_a_rolling_restart_loses_nothing(stack: Stack) -> None:
    stack.wait_until_whole()
    with Load(stack.url) as load:
        for gateway in stack.names("gateway"):
            stack.docker.run("restart", "--time", "90", gateway)
            stack.wait_until_whole()
            load.wait_for(16)
    assert load.faults == []


def test_redis_may_stand_still(stack: Stack) -> None:
    stack.wait_until_whole()
    (redis,) = stack.names("redis")
    with Load(stack.url) as load:
        stack.docker.run("pause", redis)
        load.go_on_for(4)
        stack.docker.run("unpause", redis)
        load.wait_for(24)
    assert load.faults == []


def test_a_gateway_without_a_network_takes_only_its_own_requests(stack: Stack) -> None:
    stack.wait_until_whole()
    gateway, network = stack.names("gateway")[1], f"{stack.environment['COMPOSE_PROJECT_NAME']}_back"
    with Load(stack.url) as load:
        cut = time.monotonic()
        stack.docker.run("network", "disconnect", network, gateway)
        off = time.monotonic()
        load.wait_for(40)
        stack.docker.run("network", "connect", "--alias", "gateway", network, gateway)
        stack.docker.wait_until_healthy(gateway)
        load.wait_for(16)
    assert [each for each in load.faults if not (each.began <= off and each.ended >= cut)] == []


def test_a_killed_triton_takes_only_its_own_requests_and_its_alert_reaches_the_webhook(
    stack: Stack, told: dict[str, str]
) -> None:
    stack.wait_until_whole()
    triton = stack.names("triton")[0]
    known = "max_over_time((count by (job) (up{job='triton'} == 1))[15m:30s]) == 2"
    eventually(lambda: Prometheus(stack.prometheus).query(known), 180, "Prometheus knows two Tritons", EVERY_S)
    before = len(list(stack.alerts(ALERT, "triton")))

    def last() -> list[str]:
        return [*stack.alerts(ALERT, "triton")][before:][-1:]

    with Load(stack.url) as load:
        killed = time.monotonic()
        stack.docker.run("kill", triton)
        dead = time.monotonic()
        load.wait_for(40)
        eventually(lambda: last() == ["firing"], 180, f"{ALERT} at the webhook", EVERY_S)
        told["a Triton killed, to the webhook's alert"] = (
            f"{time.monotonic() - dead:.0f} s, with an alert's `for` of 4 s"
        )
        stack.docker.run("start", triton)
        stack.docker.wait_until_healthy(triton)
        load.wait_for(16)
        eventually(lambda: last() == ["resolved"], 180, f"{ALERT} resolved at the webhook", EVERY_S)
    assert [each for each in load.faults if not (each.began <= dead and each.ended >= killed)] == []


def test_every_query_of_every_dashboard_answers(stack: Stack) -> None:
    prometheus = Prometheus(stack.prometheus)
    missing = dict.fromkeys(
        (f"{uid}: {where}", expression)
        for uid, dashboard in committed().items()
        if uid not in WITHOUT_DATA
        for where, expression in expressions(dashboard)
    )
    assert len(missing) > 50

    def all_answer() -> bool:
        for where, expression in tuple(missing):
            if any(math.isfinite(value) for value in prometheus.query(expression)):
                del missing[where, expression]
        return not missing

    with Load(stack.url):
        try:
            eventually(all_answer, 120, "data for every query", EVERY_S)
        finally:
            assert [where for where, _ in missing] == []
    picture = PROJECT / "build" / "dashboards.png"
    picture.parent.mkdir(exist_ok=True)
    draw = ["-m", "benchmarks.dashboards", "--prometheus", stack.prometheus, "--seconds", "120", "--out", str(picture)]
    subprocess.run([sys.executable, *draw], cwd=PROJECT, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_down_leaves_nothing(stack: Stack, told: dict[str, str]) -> None:
    began = time.monotonic()
    stack.compose("down", "--volumes")
    down_s = time.monotonic() - began
    told["down"] = f"{down_s:.0f} s"
    label = f"label=com.docker.compose.project={stack.environment['COMPOSE_PROJECT_NAME']}"
    for listing in (("ps", "--all"), ("network", "ls"), ("volume", "ls")):
        assert stack.docker.said(*listing, "--quiet", "--filter", label) == ""
    if "to an answer" in stack.took_s:
        assert stack.took_s["to an answer"] + down_s <= LIMIT_S
