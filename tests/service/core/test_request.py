import numpy as np
import pytest

from service.core.request import Budget, Sampling


def test_a_budget_is_an_array_as_the_models_read_it():
    found = Budget((64, 200), (32, 96)).to_array()
    assert found.dtype == np.int32
    assert found.tolist() == [64, 200, 32, 96]


@pytest.mark.parametrize(
    ("most", "vision_tokens"),
    [(300, (64, 256)), (256, (64, 256)), (255, (64, 255)), (64, (64, 64)), (63, (63, 63))],
)
def test_a_budget_within_a_bound_loses_what_is_above_it_on_both_sides(most, vision_tokens):
    assert Budget((64, 256), (32, 64)).within(most) == Budget(vision_tokens, (32, 64))


def test_sampling_is_greedy_and_unfiltered_where_nothing_is_said():
    assert Sampling() == Sampling(64, 0.0, 0, 1.0, 0, 1.0, (), True)
