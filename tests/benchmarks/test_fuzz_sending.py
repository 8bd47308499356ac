"""What counts as a failure of the service."""

from __future__ import annotations

import json

import pytest

from benchmarks.bench.http_client import Response
from benchmarks.bench.processes import Process
from benchmarks.fuzz.campaign import Campaign, dead, faults_in, grown, memory_unchecked
from benchmarks.fuzz.sending import HANG_S, Mutant, Outcome, judge, request

MUTANT = Mutant(request("/v1/vqa", b"{}", "application/json"), ("JSON",))


def error(status: int, code: str = "invalid_request", message: str = "wrong: mend it", **more: object) -> Response:
    said = {"message": message, "type": "invalid_request_error", "param": None, "code": code} | more
    return Response(status, json.dumps({"error": said}).encode())


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        (Response(200, b"{}"), ""),
        (error(400), ""),
        (error(413, "too_large"), ""),
        (error(503, "unavailable"), ""),  # tried again
        (error(429, "saturated"), ""),
        (error(500, "internal_error"), "server error"),
        (error(504, "deadline_exceeded"), "server error"),
        (error(503, "shutting_down"), "server error"),
        (Response(500, b"Internal Server Error"), "server error"),
        (Response(200, b'data: {"error":{"code":"internal_error"}}'), "server error"),
        (Response(400, b"bad request"), "error without its shape"),
        (Response(400, b'{"error": []}'), "error without its shape"),
        (Response(400, b'{"detail": "x"}'), "error without its shape"),
        (error(400, message=""), "error without its shape"),
        (error(400, param=3), "error without its shape"),
        (error(400, more=1), "error without its shape"),
        (error(400, message="<class 'int'> is wrong"), "leak"),
        (error(400, message="the image ends its decoder: save it anew"), "ended a decoder"),
    ],
)
def test_a_response_is_judged(response, fault):
    assert judge(MUTANT, response, 0.1).fault == fault


def test_a_slow_answer_is_a_hang():
    assert judge(MUTANT, Response(200, b"{}"), HANG_S + 0.1).fault == "no answer in time"


def test_a_request_may_miss_the_timeout_that_it_names():
    asked = Mutant(request("/v1/vqa", b'{"timeout_s": 1e-6}', "application/json"), ("JSON",))
    assert judge(asked, error(504, "deadline_exceeded"), 0.1).fault == ""


def test_only_decoders_may_end_and_only_at_their_limit_of_cpu_time():
    before = [Process(1, "gateway", 0, 0, 1, 1), Process(2, "triton", 0, 0, 1, 1), Process(3, "decoder", 0, 0, 1, 1)]
    assert dead(before, before[:1]) == ["triton died"]
    allowed = "level=warning event=decoder_ended reason=signal pid=9 status=-27"
    assert faults_in(allowed) == []
    assert faults_in(allowed.replace("-27", "-11")) == ["a decoder ended by signal with -11"]
    assert faults_in("event=fault request_id=1") == ["event=fault request_id=1"]


def test_memory_may_not_grow_after_the_first_thousand():
    steady = [(done, {"gateway": 100, "decoder": done}) for done in range(250, 5001, 250)]
    assert grown(steady) == []
    growing = [(done, {"gateway": 10_000 + done // 10}) for done in range(250, 5001, 250)]
    assert grown(growing) == ["gateway takes 3.0% more memory"]
    early = [(done, {"gateway": min(done, 1250)}) for done in range(250, 5001, 250)]
    assert grown(early) == []
    assert grown(growing[:8]) == []  # too short to tell


def test_a_campaign_that_is_too_short_says_that_memory_was_not_checked():
    for count in (2750, 2999, 3000):
        done = range(250, count + 1, 250)
        growing = [(each, {"gateway": each}) for each in done]
        assert bool(grown(growing)) is not bool(memory_unchecked(count))
    assert memory_unchecked(1000) == "memory not checked: that takes 3,000 requests or more"


def test_what_fails_is_kept_to_be_sent_again(tmp_path):
    campaign = Campaign(5, tmp_path)
    campaign.keep(1, MUTANT, Outcome("200", "", 0.1))
    campaign.keep(2, MUTANT, Outcome("500", "server error", 0.1, Response(500, b"oh")))
    assert (tmp_path / "5_2.http").read_bytes() == MUTANT.request
    told = json.loads((tmp_path / "5_2.json").read_text())
    assert (told["seed"], told["number"], told["fault"], told["said"]) == (5, 2, "server error", "oh")
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith("5_1")] == []
