"""Test tensors that stay on the device that computes them.

Here the device is the CPU, which reads the host's memory in place. A GPU copies it when it is bound: test_decoder.py
has a stand-in for that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import pytest_asyncio
from onnxruntime import OrtValue
from triton_python_backend_utils import InferenceRequest, start_arguments

from benchmarks.gpu.chain import on_cpu
from build_engines.convert.parity import greedy, outputs, session
from build_engines.convert.precision import to_fp16
from build_engines.convert.samples import Sample, samples
from build_engines.verify.files import read_configs
from build_engines.verify.live import answer
from service.core.card import ModelCard
from service.core.request import Budget
from service.core.vision import UInt8Array
from service.text.prompt import PromptBuilder
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton
from tests.support.servers import free_ports
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt
from triton_models import onnx_model
from triton_models.session import Array, Graph

pytestmark = pytest.mark.slow

VISION = ("vision_encoder", "relevance_allocator", "qformer")
BUDGET = Budget((64, 160), (32, 32))
TIMEOUT_S = 60.0
SCENES = 3


@pytest.fixture(scope="module")
def half(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the reference's encoder and allocator in FP16."""
    folder = tmp_path_factory.mktemp("half")
    for name in VISION[:2]:
        (folder / name / "1").mkdir(parents=True)
        model = to_fp16(name, onnx.load(repository / name / "1" / "model.onnx")).model
        onnx.save(model, folder / name / "1" / "model.onnx")
    return folder


def question(card: ModelCard) -> dict[str, Array]:
    ids, mask = np.arange(5, 37, dtype=np.int32), np.ones(32, np.int32)
    return {"question_ids": ids[None], "question_mask": mask[None], "budget": BUDGET.to_array()[None]}


def test_bound_outputs_are_those_of_a_plain_run_from_model_to_model(
    half: Path, card: ModelCard, pixels: UInt8Array
) -> None:
    """FP16 outputs of one model go into the next without arrays on the host."""
    encoder, allocator = (Graph(half / name / "1" / "model.onnx") for name in VISION[:2])
    image, asked = {"image": pixels[None]}, question(card)
    seen = dict(zip(encoder.outputs, encoder.run(image, list(encoder.outputs)), strict=True))
    chosen = allocator.run({name: (seen | asked)[name] for name in allocator.inputs}, list(allocator.outputs))

    def lent(arrays: dict[str, Array]) -> dict[str, OrtValue]:
        return {name: OrtValue.from_dlpack(array) for name, array in arrays.items()}

    bound = dict(zip(encoder.outputs, encoder.run_bound(lent(image), list(encoder.outputs)), strict=True))
    assert bound["features"].data_type() == "tensor(float16)"
    both = bound | lent(asked)
    theirs = allocator.run_bound({name: both[name] for name in allocator.inputs}, list(allocator.outputs))
    for name, value in bound.items():
        assert np.array_equal(value.numpy(), seen[name]), name
    for name, value, expected in zip(allocator.outputs, theirs, chosen, strict=True):
        assert np.array_equal(value.numpy(), expected), name


def test_what_was_given_out_is_not_overwritten_by_the_next_run(half: Path, pixels: UInt8Array) -> None:
    encoder = Graph(half / "vision_encoder" / "1" / "model.onnx")
    (first,) = encoder.run_bound({"image": OrtValue.from_dlpack(pixels[None])}, ["features"])
    kept = first.numpy().copy()
    (second,) = encoder.run_bound({"image": OrtValue.from_dlpack(255 - pixels[None])}, ["features"])
    assert np.array_equal(first.numpy(), kept)
    assert not np.array_equal(second.numpy(), kept)


def test_the_runner_binds_where_it_is_told_to(half: Path, pixels: UInt8Array) -> None:
    """Requests run one by one, and a faulty one fails alone."""
    names = ["features", "saliency", "entropy", "texture"]
    answers = []
    for told in ({}, {"io_binding": "yes"}):
        model = onnx_model.TritonPythonModel()
        model.initialize(
            start_arguments(half / "vision_encoder", inputs=["image"], outputs=names, parameters=told)
            | {"model_instance_device_id": "0"}
        )
        asked = [InferenceRequest({"image": image[None]}, names[:2]) for image in (pixels, 255 - pixels)]
        faulty = InferenceRequest({"image": pixels[None, :, :7]}, names[:2])
        found = model.execute([asked[0], faulty, asked[1]])
        assert [response.error is None for response in found] == [True, False, True]
        assert all(set(response.outputs) == set(names[:2]) for response in found[::2])
        answers.append([response.outputs for response in found[::2]])
    for plain, bound in zip(*answers, strict=True):
        assert all(np.array_equal(plain[name], bound[name]) for name in names[:2])


def test_a_word_that_is_neither_yes_nor_no_fails_the_load(half: Path) -> None:
    arguments = start_arguments(
        half / "vision_encoder", inputs=["image"], outputs=["features"], parameters={"io_binding": "perhaps"}
    )
    with pytest.raises(ValueError, match="io_binding of vision_encoder must be yes or no, not perhaps"):
        onnx_model.TritonPythonModel().initialize(arguments)


@pytest.fixture(scope="module")
def bound(exports: SharedExports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replace GPU by CPU in the configurations of a tiny checkpoint's `onnx-gpu` repository."""
    built = exports.built("opt", save_blip2_opt, "onnx-gpu") / "repository"
    for name, config in read_configs(built).items():
        told = {key: value.string_value for key, value in config.parameters.items()}
        assert told.get("provider") == ("cuda" if name in (*VISION, "llm") else None)
        assert told.get("io_binding") == ("yes" if name in VISION else None)
        assert told.get("FORCE_CPU_ONLY_INPUT_TENSORS") == ("no" if name in VISION else None)
        on_gpu = [(group.kind == group.KIND_GPU, list(group.gpus)) for group in config.instance_group]
        if config.platform != "ensemble":
            assert on_gpu == [(True, [0]) if name in (*VISION, "llm") else (False, [])]
    return on_cpu(built, tmp_path_factory.mktemp("bound") / "repository")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(bound: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TritonClient]:
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    log_path = tmp_path_factory.mktemp("triton") / "triton.log"
    card = ModelCard.from_json((bound / "card.json").read_text())
    async with (
        TritonClient(access.url, access.url) as client,
        EmbeddedTriton(bound, client=client, card=card, log_path=log_path, access=access),
    ):
        yield client


def computed(repository: Path, given: list[Sample], prompts: PromptBuilder) -> dict[str, Array]:
    """Compute the graphs' own outputs for these images and questions."""
    asked = [prompts.question(text) for _, text in given]
    found: dict[str, Array] = {
        "image": np.stack([pixels for pixels, _ in given]),
        "question_ids": np.stack([each.ids for each in asked]),
        "question_mask": np.stack([each.mask for each in asked]),
        "budget": np.stack([BUDGET.to_array()] * len(given)),
    }
    for name in VISION:
        found |= outputs(repository / name / "1" / "model.onnx", found)
    return found


async def test_a_bound_repository_serves_in_a_real_triton_what_its_graphs_give(
    bound: Path, served: TritonClient
) -> None:
    card = ModelCard.from_json((bound / "card.json").read_text())
    assert card.float_type == "FP16"
    prompts, given = PromptBuilder.load(card, bound), samples(None, SCENES)
    expected, llm = computed(bound, given, prompts), session(bound / "llm" / "1" / "model.onnx")
    for row, (pixels, text) in enumerate(given):
        vision, seen = await served.see(pixels, prompts.question(text), BUDGET, TIMEOUT_S)
        assert vision.features.dtype == np.float16
        assert np.array_equal(vision.features, expected["features"][row])
        count = len(seen.visual_tokens)
        assert np.array_equal(seen.visual_tokens, expected["visual_tokens"][row, :count])
        said = await answer(served, card, prompts.compose(text, [(seen.visual_tokens, b"%d" % row)]))
        ids = np.array(prompts.text_ids(text))
        assert said == greedy(llm, seen.visual_tokens, ids, 12, card.end_id)
