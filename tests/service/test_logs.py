"""Every line of a JSON log is JSON, and the lines of answers say who asked about what."""

from __future__ import annotations

import json
import logging
from io import StringIO

import grpc
import httpx
import pytest
import structlog

from service.edges.grpc.calls import address_in
from service.edges.grpc.stubs.vqa_pb2_grpc import VisualQuestionAnsweringStub
from service.logs import configure_log
from service.settings import Settings
from service.triton_server.supervision import EmbeddedTriton
from tests.support.calls import question
from tests.support.fakes import png
from tests.support.servers import StartGateway

SETTINGS = {"GLIMPSE_LOG_FORMAT": "json", "GLIMPSE_LOG_CLIENT_ADDRESS": "true"}


@pytest.mark.parametrize(("proxies", "client"), [("", "127.0.0.1"), ("127.0.0.0/8", "203.0.113.7")])
def test_a_service_writes_nothing_but_json(
    start_gateway: StartGateway, triton: EmbeddedTriton, proxies: str, client: str
) -> None:
    url = triton.access.url
    told = {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_TRUSTED_PROXIES": proxies, **SETTINGS}
    metadata = {"x-tenant-id": "acme", "x-forwarded-for": "6.6.6.6, 203.0.113.7, 127.0.0.9"}
    with start_gateway(told) as gateway:
        with httpx.Client(base_url=gateway.url, headers=metadata, trust_env=False) as http:
            form = {"files": {"image": png((3, 1, 4))}, "data": {"question": "what color is it?"}}
            image_id = http.post("/v1/vqa", **form).json()["image_ids"][0]
            assert http.post("/v1/vqa", files={"image": b"x"}, data={"question": "?"}).status_code == 400
        with grpc.insecure_channel(gateway.rpc) as channel:
            answer = VisualQuestionAnsweringStub(channel).Answer
            answer(question(image_id, "what color is it?"), timeout=30, metadata=list(metadata.items()))
    lines = [json.loads(line) for line in gateway.log().splitlines()]
    assert {"level", "timestamp", "event"} <= set.intersection(*(set(line) for line in lines))
    assert [line["event"] for line in lines if line["event"] in ("listening", "stopped")] == ["listening", "stopped"]
    by_http, refused, by_grpc = [line for line in lines if line["event"] in ("answered", "not_answered")]
    assert (by_http["tenant"], by_http["image_ids"], by_http["client"]) == ("acme", image_id, client)
    assert (refused["event"], refused["tenant"]) == ("not_answered", "acme")
    assert (by_grpc["tenant"], by_grpc["image_ids"], by_grpc["client"]) == ("acme", image_id, client)


@pytest.mark.parametrize("log_format", ["json", "logfmt"])
def test_lines_of_libraries_have_the_same_form(log_format):
    out, before = StringIO(), (structlog.get_config(), logging.getLogger().handlers[:])
    try:
        configure_log(Settings(log_format=log_format), out)  # type: ignore[arg-type]
        try:
            int('"quoted"\nlines')
        except ValueError:
            logging.getLogger("library").exception("it %s", "failed")
    finally:
        structlog.configure(**before[0])
        logging.getLogger().handlers = before[1]
        logging.captureWarnings(False)
    (line,) = out.getvalue().splitlines()
    if log_format == "json":
        said = json.loads(line)
        assert (said["event"], said["level"], said["logger"]) == ("it failed", "error", "library")
        assert "ValueError" in said["exception"]
    else:
        assert 'level=error event="it failed"' in line


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:127.0.0.1:5000", "127.0.0.1"), ("ipv6:%5B::1%5D:5000", "::1"), ("ipv6:[2001:db8::7]:80", "2001:db8::7")],
)
def test_the_address_of_a_grpc_peer(peer, address):
    assert address_in(peer) == address
