import grpc
import pytest

from service.core import errors
from service.core.errors import STATUS, FirstTokenLate, GlimpseError, InvalidImage, Overloaded, naming_image, status_of


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
    codes = [kind.code for kind in kinds() if kind is not FirstTokenLate]  # callers see it as its parent
    assert len(codes) == len(set(codes))


def test_a_kind_without_a_row_takes_its_parents():
    assert InvalidImage not in STATUS
    assert status_of(InvalidImage("why")) == (400, "INVALID_ARGUMENT")


def test_the_root_has_no_status_as_nobody_raises_it():
    with pytest.raises(LookupError, match=r"^GlimpseError has no status$"):
        status_of(GlimpseError("why"))


def test_an_error_carries_what_the_edges_tell():
    error = InvalidImage("why", param="image", code="special")
    assert (str(error), error.message, error.param, error.code) == ("why", "why", "image", "special")
    assert error.cause == ""
    assert InvalidImage("why", cause="libpng").cause == "libpng"


def test_a_full_service_says_when_to_come_back_beside_what_every_error_says():
    full = Overloaded("full", retry_after_s=2.5, code="quota", cause="queue")
    assert (full.message, full.retry_after_s, full.code, full.cause) == ("full", 2.5, "quota", "queue")
    plain = Overloaded("full")
    assert (plain.retry_after_s, plain.code, plain.cause, plain.param) == (1.0, "overloaded", "", None)


@pytest.mark.parametrize(
    ("index", "of", "param", "message"),
    [(0, 1, "image", "why"), (0, 2, "images.0", "image 1 of 2: why"), (2, 3, "images.2", "image 3 of 3: why")],
)
def test_an_error_of_one_of_several_images_says_which(index, of, param, message):
    with pytest.raises(InvalidImage) as caught, naming_image(index, of):
        raise InvalidImage("why", param="image")
    assert (caught.value.param, caught.value.message, str(caught.value)) == (param, message, message)


def test_an_error_of_something_else_is_not_one_of_an_image():
    with pytest.raises(Overloaded) as caught, naming_image(1, 2):
        raise Overloaded("full")
    assert (caught.value.param, caught.value.message) == (None, "full")
