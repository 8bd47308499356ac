"""Run the GPU benchmark on this CPU with a tiny model: only the device differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.device import Device
from benchmarks.gpu.fp8 import Fp8Linear
from benchmarks.gpu.large import Chain
from benchmarks.gpu.model import ENCODER
from build_engines.convert.parity import greedy, outputs, session
from build_engines.convert.samples import samples
from build_engines.export import graphs
from build_engines.model.checkpoint import Checkpoint
from tests.support.paths import PROJECT
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt

pytestmark = pytest.mark.slow

CPU = Device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu") / "opt"
    save_blip2_opt(directory)
    return directory


@pytest.fixture(scope="module")
def told(tiny: Path, exports: SharedExports, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the whole command and return its report."""
    work = tmp_path_factory.mktemp("told")
    out = work / "gpu.json"
    small = ["--batches", "1", "3", "--gemm", "256", "--tokens", "4", "--repeats", "2"]
    models = ["--device", "cpu", "--model", str(tiny), "--reference", str(tiny)]
    for profile in ("embedded", "onnx-gpu"):  # the benchmark's own builds find their steps finished
        built = exports.built(tiny.name, save_blip2_opt, profile) / "repository"
        for suffix in ("", ".build"):
            shutil.copytree(f"{built}{suffix}", work / f"{profile}{suffix}")
    lend_encoder(tiny, exports, work)
    assert gpu.main([*models, *small, "--work", str(work), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def lend_encoder(tiny: Path, exports: SharedExports, work: Path) -> None:
    """Put the exported graph where `graphs_of_encoder` writes its own."""
    graph = next(graph for graph in graphs(Checkpoint.load(tiny)) if graph.name == ENCODER)
    (work / "fp32").mkdir()
    exports.write(graph, work / "fp32" / f"{ENCODER}.onnx")


def test_the_encoder_is_timed_every_way_against_a_measured_peak(told: dict[str, Any]) -> None:
    found = told["encoder"]
    assert all(found["peak_tflops"][precision] > 0 for precision in ("fp32", "fp16", "fp8"))
    assert list(found["ways"]) == ["onnxruntime fp32", "onnxruntime fp16", "pytorch fp16", "pytorch fp8"]
    for name, way in found["ways"].items():
        assert way["features_against_fp32_on_the_cpu"]["least_cosine"] > 0.99, name
        for batch in ("1", "3"):
            timed = way["batches"][batch]
            assert timed["images_per_s"] == pytest.approx(1000 * int(batch) / timed["median_ms"], rel=1e-2)
            share = timed["images_per_s"] * found["gflops_per_image"] / 1000 / found["peak_tflops"][way["precision"]]
            assert timed["mfu"] == pytest.approx(share, rel=1e-2)
    assert told["device"]["name"]


def test_the_chain_is_served_and_compared_with_fp32(told: dict[str, Any]) -> None:
    """One answer of eight may differ in FP16, because random weights leave tokens almost tied."""
    failed = {check["name"] for check in told["chain"]["checks"] if check["state"] == "failed"}
    assert failed <= {"answers are those of FP32"}
    measured = told["chain"]["measured"]
    assert measured["features_parity"]["least_cosine"] > 0.995
    assert measured["visual_tokens_parity"]["least_cosine"] > 0.995
    assert measured["answers_agree"] > 0.5
    assert measured["chain"]["first_token_ms"] > 0


def test_a_large_model_is_timed_end_to_end(told: dict[str, Any]) -> None:
    found = told["large"]
    for rows in ("1", "8"):
        timed = found["rows"][rows]
        assert timed["first_token_ms"] > timed["between_tokens_ms"] > 0
        assert timed["tokens_per_s"] == pytest.approx(1000 * int(rows) / timed["between_tokens_ms"], rel=1e-2)
    assert found["peak_memory_bytes"] > 0


def test_its_answers_in_fp16_are_those_of_the_reference_graphs(repository: Path) -> None:
    chain = Chain(Checkpoint.load(PROJECT / "reference"), CPU)
    pixels = np.stack([image for image, _ in samples(None, 2)])
    ids, mask = np.full((2, 32), 7, np.int32), np.ones((2, 32), np.int32)
    text = np.array([[1, 40, 41, 42]] * 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        visual = chain.see(*(torch.from_numpy(each) for each in (pixels, ids, mask)))
        answer = chain.answer(visual, torch.from_numpy(text), 5)
    found = outputs(repository / "vision_encoder" / "1" / "model.onnx", {"image": pixels})
    found |= {"question_ids": ids, "question_mask": mask, "budget": np.array([[64, 256, 32, 32]] * 2, np.int32)}
    found |= outputs(repository / "relevance_allocator" / "1" / "model.onnx", found)
    found["attend"] = (found["vision_mask"] > 0).astype(np.int32)
    found |= outputs(repository / "qformer" / "1" / "model.onnx", found)
    assert visual.float().numpy() == pytest.approx(found["visual_tokens"], abs=0.05)
    llm = session(repository / "llm" / "1" / "model.onnx")
    for row, tokens in enumerate(answer.tokens):
        assert tokens.tolist() == greedy(llm, found["visual_tokens"][row], text[row], 5, end_id=-1)


def test_an_fp8_layer_is_near_its_own() -> None:
    torch.manual_seed(3)
    linear, values = torch.nn.Linear(64, 32), torch.randn(2, 5, 64)
    ours = Fp8Linear(linear)
    found, wanted = ours(values).float(), linear(values)
    assert found.shape == wanted.shape
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.998
    assert torch.equal(ours(values).float(), found)


def test_other_parts_of_the_same_device_stay(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--model", str(tiny), "--tokens", "2", "--repeats", "1", "--out", str(out)]
    out.write_text(json.dumps({"device": CPU.about(), "model": str(tiny), "chain": "as it was"}))
    assert gpu.main([*arguments, "--only", "large"]) == 0
    assert json.loads(out.read_text())["chain"] == "as it was"
    out.write_text(json.dumps({"device": {"name": "another"}, "model": str(tiny), "chain": "as it was"}))
    assert gpu.main([*arguments, "--only", "large"]) == 0
    assert "chain" not in json.loads(out.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="finds no GPU: --device cpu runs the same here"):
        gpu.main([])
