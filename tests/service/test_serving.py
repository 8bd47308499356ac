"""The start of `python -m service`, without a Triton."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from service.serving import bound
from service.settings import MOST_NUMBER, MOST_WHOLE_NUMBER, PREFIX, Settings
from service.triton_server.installation import StartFailed
from tests.support.fakes import png
from tests.support.servers import START_S, RedisServer, eventually, started_gateway

FEW = {"decode_workers": 1}  # each is a process


def test_a_host_of_ipv6_where_there_is_none_is_told(without_ipv6: None) -> None:
    with pytest.raises(StartFailed, match=r"cannot listen on ::1 \(Address family not .*set GLIMPSE_HTTP_HOST"):
        bound("::1", 0, "GLIMPSE_HTTP_PORT")


def largest(name: str) -> int | float:
    """The largest number that this setting takes."""
    field = Settings.model_fields[name]
    bounds = [bound.le for bound in field.metadata if hasattr(bound, "le")]
    most = MOST_NUMBER if field.annotation is float else MOST_WHOLE_NUMBER
    return FEW.get(name, min([most, *bounds]))


@pytest.mark.servers
def test_the_largest_numbers_work(repository: Path, tmp_path: Path, redis_server: RedisServer) -> None:
    kinds = (int, float, int | None, float | None)
    fields = Settings.model_fields.items()
    names = [name for name, field in fields if field.annotation in kinds and not name.endswith("_port")]
    settings = {PREFIX + name.upper(): str(largest(name)) for name in names}
    settings |= {"GLIMPSE_VISION_URL": "127.0.0.1:9", "GLIMPSE_LLM_URL": "127.0.0.1:9"}
    settings |= {"GLIMPSE_REDIS_URL": redis_server.url, "GLIMPSE_MODEL_REPOSITORY": str(repository)}
    with started_gateway(tmp_path, settings) as gateway:
        eventually(lambda: "redis_in_use" in gateway.log() or gateway.process.poll() is not None, START_S, "a start")
        assert gateway.process.poll() is None, gateway.log()
        image = httpx.post(f"{gateway.url}/v1/images", content=png((1, 2, 3)), timeout=30)
        assert image.status_code == 200, image.text
        eventually(lambda: redis_server.client.keys("glimpse:*:image:*"), 10, "an image in Redis")
        question = {"image": image.json()["id"], "question": "what?"}
        assert httpx.post(f"{gateway.url}/v1/vqa", json=question, timeout=30).status_code == 503  # no Triton
    assert gateway.process.returncode == 0
    assert "Traceback" not in gateway.log()
