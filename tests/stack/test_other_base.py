"""An image on the other Debian, under a real engine."""

from __future__ import annotations

import os

from tests.stack.conftest import Docker
from tests.stack.test_images import answers_without_a_right_or_a_file


def test_all_in_one_answers_on_the_other_debian_too(docker: Docker) -> None:
    assert os.environ["STACK_OTHER_BASE"] != os.environ["STACK_BASE"]
    answers_without_a_right_or_a_file(docker, "glimpse/all-in-one:other-base")
