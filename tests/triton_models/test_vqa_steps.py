"""Test the small steps of the `vqa` ensemble as Triton calls them.

They use the committed card and tokenizer.
"""

import gc
import threading
import weakref
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from triton_python_backend_utils import InferenceRequest, start_arguments

from service.core.card import ModelCard
from service.media.decoder import ImageLimits, decode
from service.settings import Settings
from service.text.prompt import PromptBuilder, load_tokenizer
from triton_models import compose, finish, prepare
from triton_models.batcher import Event
from triton_models.delivery import THREADS, Delivery
from triton_models.tensors import write

REPOSITORY = Path(__file__).parents[2] / "model_repository"
CARD = ModelCard.from_json((REPOSITORY / "card.json").read_text())
TOKENIZER = load_tokenizer(REPOSITORY / "tokenizer.json")
PROMPTS = PromptBuilder(CARD, TOKENIZER)


def run(module, outputs: list[str], **inputs):
    name = module.__name__.rpartition(".")[2]
    model = module.TritonPythonModel()
    model.initialize(start_arguments(REPOSITORY / name, inputs=list(inputs), outputs=outputs))
    (response,) = model.execute([InferenceRequest(inputs, outputs)])
    return response


def as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)[np.newaxis]


def picture() -> bytes:
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


PREPARED = ["image", "question_ids", "question_mask", "budget", "prompt_ids"]


def test_prepare_reads_image_and_question_as_the_gateway_does():
    text = "what colour is the circle?"
    found = run(prepare, PREPARED, image_bytes=as_bytes(picture()), question=as_bytes(text.encode())).outputs
    np.testing.assert_array_equal(found["image"][0], decode(picture(), ImageLimits()).pixels)
    np.testing.assert_array_equal(found["question_ids"][0], PROMPTS.question(text).ids)
    np.testing.assert_array_equal(found["question_mask"][0], PROMPTS.question(text).mask)
    assert found["budget"].tolist() == [[*CARD.vision_tokens, *CARD.default_visual_tokens]]
    assert found["prompt_ids"][0].tolist() == PROMPTS.text_ids(text)


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        (picture(), b"  ", "the question is empty"),
        (picture(), b"\xff", "not UTF-8"),
        (picture(), b"?" * 2_001, "2,001 characters: shorten it to 2,000"),
        (picture(), b"\xff" * 8_001, "8,001 bytes: shorten it to 2,000 characters"),
        (b"GIF89a", b"what?", "GIF is damaged"),
        (b"", b"what?", "0 bytes"),
    ],
)
def test_prepare_says_what_is_wrong(image, question, message):
    error = run(prepare, PREPARED, image_bytes=as_bytes(image), question=as_bytes(question)).error
    assert message in error.message()
    assert error.code == "INVALID_ARG"


def test_prepare_takes_the_longest_question_that_the_gateway_takes():
    most = Settings.model_fields["max_question_chars"].default
    assert most == prepare.MAX_QUESTION_CHARS
    longest = ("圆" * most).encode()
    assert run(prepare, PREPARED, image_bytes=as_bytes(picture()), question=as_bytes(longest)).error is None


COMPOSED = [
    "input_ids", "input_lengths", "request_output_len", "prompt_embedding_table", "prompt_vocab_size",
    "prompt_table_extra_ids", "end_id", "pad_id", "streaming", "temperature", "runtime_top_k", "runtime_top_p", "seed",
    "repetition_penalty",
]  # fmt: skip


def visual(count: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).normal(size=(1, 128, CARD.hidden_size)).astype(np.float32)
    return {"visual_tokens": tokens, "visual_count": np.array([[count]], np.int32)}


def test_compose_puts_the_visual_ids_before_the_text():
    inputs = visual(64)
    found = run(compose, COMPOSED, **inputs, prompt_ids=np.array([[7, 8, 9]], np.int32)).outputs
    first = CARD.vocab_size
    assert found["input_ids"].tolist() == [[*range(first, first + 64), 7, 8, 9]]
    assert found["input_lengths"].tolist() == [[67]]
    assert found["prompt_vocab_size"].tolist() == [[64]]
    np.testing.assert_array_equal(found["prompt_embedding_table"], inputs["visual_tokens"][:, :64])
    extra = found["prompt_table_extra_ids"][0]
    assert extra[64:].tolist() == [0, 0, 0]
    assert extra[:64].min() >= 1
    assert (found["end_id"].item(), found["pad_id"].item()) == (CARD.end_id, CARD.pad_id)
    assert (found["temperature"].item(), found["runtime_top_p"].item(), found["request_output_len"].item()) == (
        0,
        1,
        64,
    )


@pytest.mark.parametrize("count", [-1, 0, 129, 2**31 - 1])
def test_compose_refuses_a_count_that_its_rows_do_not_have(count):
    """Ids of two billion visual tokens would take 24 GB."""
    error = run(compose, COMPOSED, **visual(count), prompt_ids=np.array([[7]], np.int32)).error
    assert error.code == "INVALID_ARG"
    assert f"visual_count is {count}, but visual_tokens has 128 rows" in error.message()


def test_what_is_not_finite_is_the_vision_models_fault_and_not_the_clients():
    poisoned = visual(32)
    poisoned["visual_tokens"][0, 31, 0] = np.inf
    error = run(compose, COMPOSED, **poisoned, prompt_ids=np.array([[7]], np.int32)).error
    assert error.code == "INTERNAL"
    assert "not finite" in error.message()


def test_compose_hands_the_sampling_on():
    wishes = {
        "max_tokens": np.array([[3]], np.int32),
        "temperature": np.array([[0.5]], np.float32),
        "top_k": np.array([[4]], np.int32),
        "top_p": np.array([[0.25]], np.float32),
        "seed": np.array([[2**64 - 1]], np.uint64),
    }
    found = run(compose, COMPOSED, **visual(32), prompt_ids=np.array([[7]], np.int32), **wishes).outputs
    names = ["request_output_len", "temperature", "runtime_top_k", "runtime_top_p", "seed"]
    assert [found[name].item() for name in names] == [3, 0.5, 4, 0.25, 2**64 - 1]


def test_equal_visual_tokens_have_equal_extra_ids_and_others_do_not():
    ids = np.array([[7]], np.int32)
    one, again = (run(compose, COMPOSED, **visual(32), prompt_ids=ids).outputs for _ in range(2))
    other = visual(32)
    other["visual_tokens"][0, 0, 0] += 1
    different = run(compose, COMPOSED, **other, prompt_ids=ids).outputs
    key = "prompt_table_extra_ids"
    assert one[key].tolist() == again[key].tolist()
    assert one[key].tolist() != different[key].tolist()


def spoken(*ids: int) -> bytes:
    return run(finish, ["answer"], output_ids=np.array([[ids]], np.int32)).outputs["answer"].tobytes()


def test_finish_gives_bytes_whose_concatenation_is_the_text():
    text = " rôuge 圆"
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)  # some characters take several tokens
    assert b"".join(spoken(each) for each in ids).decode() == text
    assert spoken(*ids).decode() == text


def test_finish_says_nothing_for_the_end_special_and_unknown_ids():
    assert spoken(CARD.end_id) == b""
    assert spoken(CARD.pad_id, CARD.bos_id, CARD.vocab_size + 5) == b""


def test_an_array_handed_to_triton_is_freed_with_its_tensor():
    class Watched(np.ndarray):
        pass

    array = np.zeros((2, 3), np.float32).view(Watched)
    watch = weakref.ref(array)
    tensor = write("x", array)
    del array
    gc.collect()
    assert watch() is not None
    del tensor
    gc.collect()
    assert watch() is None


def test_events_are_told_in_order_and_no_call_runs_ahead_of_the_one_before():
    told, gate = [], threading.Event()

    def say(event) -> None:
        if event.token == 0:
            gate.wait(10)
        told.append(event.token)

    def events(*tokens: int) -> list[Event]:
        return [Event(None, token, 0.0, False) for token in tokens]

    delivery = Delivery(say)
    delivery.hand_out(events(0, *range(10, 10 + THREADS)))
    later = threading.Thread(target=delivery.hand_out, args=(events(100),))
    later.start()
    later.join(0.05)
    assert later.is_alive()  # blocked until the first call's events are sent
    assert 100 not in told
    gate.set()
    later.join(10)
    delivery.close()
    assert sorted(told) == [0, *range(10, 10 + THREADS), 100]
    assert told[-1] == 100
