import math

import numpy as np
import pytest

from service.core import Relevance


def relevance(values: np.ndarray) -> Relevance:
    plain = np.zeros((16, 16), np.float32)
    return Relevance(values.astype(np.float32), np.stack([plain] * 3), np.zeros((8, 8), np.int32), np.zeros(3))


@pytest.mark.parametrize("patches", [1, 2, 16, 256])
def test_relevance_is_as_even_as_the_patches_it_lies_on_are_many(patches):
    spread = np.zeros((16, 16))
    spread.flat[:patches] = 0.3
    assert relevance(spread).evenness == pytest.approx(math.log(patches) / math.log(256))


def test_relevance_nowhere_is_even():
    assert relevance(np.zeros((16, 16))).evenness == 1.0
