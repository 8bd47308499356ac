"""How sure the committed model says that it is, through a running service."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.paths import PROJECT, SCENES
from tests.support.servers import Gateway


@pytest.fixture(scope="module", autouse=True)
def committed(repository: Path) -> None:
    if repository != PROJECT / "model_repository":
        pytest.skip("the calibration is that of the committed models")


def asked(gateway: Gateway, image: bytes, question: str, **fields: object) -> dict[str, Any]:
    body = {"image": base64.b64encode(image).decode(), "question": question, **fields}
    response = httpx.post(f"{gateway.url}/v1/vqa", json=body, timeout=60, trust_env=False)
    return dict(response.raise_for_status().json())


SCENE = (SCENES / "new_003.webp").read_bytes()  # a blue ring, a pink square with 8, a cyan triangle and a blue square


def test_a_clear_question_has_a_confident_answer(gateway: Gateway) -> None:
    said = asked(gateway, SCENE, "what character is on the pink square?", min_confidence=0.5)
    assert said["answer"] == "8"
    assert said["confidence"] > 0.7
    assert said["found"] > 0.8
    assert said["vision"]["familiar"] > 0.8
    assert said["abstained"] is False
    assert "reason" not in said


def test_an_absent_object_is_not_found(gateway: Gateway) -> None:
    said = asked(gateway, SCENE, "what character is on the orange circle?", min_confidence=0.5)
    assert said["found"] < 0.5
    assert said["abstained"] is True
    assert said["reason"] == "not_found"
    assert said["answer"]
    denied = asked(gateway, SCENE, "is there an orange circle?", min_confidence=0.5)
    assert denied["found"] < 0.5
    assert denied["answer"] == "no"
    assert denied["abstained"] is False


def test_noise_is_an_unfamiliar_image(gateway: Gateway) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    said = asked(gateway, file.getvalue(), "how many circles are there?", min_confidence=0.5)
    assert said["vision"]["familiar"] < 0.2
    assert said["abstained"] is True
    assert said["reason"] == "unfamiliar_image"


def test_a_question_that_names_nothing_tells_nothing_found(gateway: Gateway) -> None:
    said = asked(gateway, SCENE, "how many objects are there?")
    assert "found" not in said
    assert "abstained" not in said
    assert 0 < said["confidence"] <= 1
