import grpc
import pytest

from service.core import errors
from service.core.errors import STATUS, GlimpseError, InvalidImage, Overloaded, status_of


def kinds(root: type[GlimpseError] = GlimpseError) -> list[type[GlimpseError]]:
    return [kind for child in root.__subclasses__() for kind in (child, *kinds(child))]


@pytest.mark.parametrize("kind", kinds())
def test_every_error_has_a_status_of_both_protocols_a_code_and_a_type(kind):
    http, rpc = status_of(kind("why"))
    assert 400 <= http < 600
    assert rpc in grpc.StatusCode.__members__
    assert kind.code != GlimpseError.code
    assert kind.type


def test_every_row_is_an_error_that_exists():
    assert set(STATUS) <= set(kinds())


def test_every_error_is_in_the_tree_of_the_modules_docstring():
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds())


def test_codes_are_told_apart():
    codes = [kind.code for kind in kinds()]
    assert len(codes) == len(set(codes))


def test_a_kind_without_a_row_takes_its_parents():
    assert InvalidImage not in STATUS
    assert status_of(InvalidImage("why")) == (400, "INVALID_ARGUMENT")


def test_the_root_has_no_status_as_nobody_raises_it():
    with pytest.raises(LookupError):
        status_of(GlimpseError("why"))


def test_an_error_carries_what_the_edges_tell():
    error = InvalidImage("why", param="image", code="special")
    assert (str(error), error.message, error.param, error.code) == ("why", "why", "image", "special")
    assert Overloaded("full", retry_after_s=2.5).retry_after_s == 2.5
