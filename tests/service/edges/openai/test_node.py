"""npm's openai package, unmodified, against a real gateway.

The set-up installs nothing from npm. The test runs if Node.js finds the package: `npm install --prefix FOLDER openai`,
then NODE_PATH=FOLDER/node_modules.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from service.core.card import ModelCard
from tests.support.paths import SCENES
from tests.support.servers import Gateway

SCENE = SCENES / "new_003.webp"


def has_package() -> bool:
    """Whether Node.js is there and finds openai."""
    if shutil.which("node") is None:
        return False
    return subprocess.run(["node", "-e", "require.resolve('openai')"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_package(), reason="Node.js does not find npm's openai: install it and set NODE_PATH")
def test_npms_client_gets_answers_streams_files_and_its_own_errors(gateway: Gateway, card: ModelCard) -> None:
    script = Path(__file__).with_name("client.mjs")
    command = ["node", script, f"{gateway.url}/v1", card.name, SCENE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["models"] == [card.name]
    assert said["whole"]
    assert said["whole"] == said["streamed"] == said["by_id"]
    assert said["vision"]["detail"] == "low"
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]
    assert said["errors"] == [
        ["BadRequestError", 400, "unsupported_parameter", "n"],
        ["NotFoundError", 404, "image_not_found", "messages.0.content.1.image_url"],
        ["NotFoundError", 404, "model_not_found", "model"],
        ["InternalServerError", 504, "deadline_exceeded", "timeout_s"],
    ]
