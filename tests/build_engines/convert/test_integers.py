"""Products of integers instead of FP32: how near they come, and that rows do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from build_engines.convert.integers import (
    GREATEST_WEIGHT,
    packed_blocks,
    products,
    round_to_bf16,
    rounded_columns,
    to_int4,
    to_int8,
)
from triton_models.session import Graph

INPUTS, OUTPUTS = 128, 96


def saved(folder: Path, *, external: bool = False) -> Path:
    """x [n, 128] @ first [128, 96] and @ second^T [96, 128], which stands transposed, as a language model's head."""
    random = np.random.default_rng(0)
    first = random.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    second = random.standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["one"], name="plain"),
            helper.make_node("Gemm", ["x", "second"], ["two"], name="head", transB=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", INPUTS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", OUTPUTS]) for name in ("one", "two")],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=external, location="weights", size_threshold=0)
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return np.concatenate(Graph(path).run({"x": x}, ["one", "two"]), axis=1)


def converted(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path.with_name("changed.onnx"))
    return path.with_name("changed.onnx")


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root mean square of the difference, as a share of the values'."""
    return float(np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()))


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.15)])
def test_integers_come_near_fp32(tmp_path: Path, external: bool, bits: int, most: float) -> None:
    path = saved(tmp_path, external=external)
    change = {8: lambda model: to_int8("llm", model, tmp_path), 4: lambda model: to_int4(model, tmp_path)}[bits]
    changed = converted(path, change)
    x = np.random.default_rng(1).standard_normal((5, INPUTS)).astype(np.float32)
    assert 0 < off(run(changed, x), run(path, x)) < most
    assert not list(products(onnx.load(changed)))
    assert changed.stat().st_size < sum(each.stat().st_size for each in tmp_path.iterdir()) / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rows_result_does_not_depend_on_the_rows_beside_it(tmp_path: Path, bits: int) -> None:
    change = {8: lambda model: to_int8("llm", model, tmp_path), 4: lambda model: to_int4(model, tmp_path)}[bits]
    changed = converted(saved(tmp_path), change)
    x = np.random.default_rng(2).standard_normal((4, INPUTS)).astype(np.float32)
    alone = run(changed, x[:1])
    x[1:] *= 1000  # outliers in the others' activations
    np.testing.assert_allclose(run(changed, x)[:1], alone, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_zeros(tmp_path: Path) -> None:
    changed = converted(saved(tmp_path), lambda model: to_int8("llm", model, tmp_path))
    assert not run(changed, np.zeros((2, INPUTS), np.float32)).any()


def test_two_products_of_the_greatest_numbers_fit_in_16_bits(tmp_path: Path) -> None:
    """On a CPU without VNNI the sum of two would be cut off at 32767."""
    levels, scale = rounded_columns(np.random.default_rng(3).standard_normal((64, 8)).astype(np.float32))
    assert np.abs(levels).max() == GREATEST_WEIGHT
    assert scale.shape == (8,)
    assert 2 * 255 * GREATEST_WEIGHT < 2**15


def test_four_bits_unpack_to_the_weights_that_they_were_rounded_to() -> None:
    weights = np.random.default_rng(4).standard_normal((INPUTS, 6)).astype(np.float32)
    packed, scale = packed_blocks(weights)
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scale.shape, -1).astype(np.int32) - 8
    found = (levels * scale[..., np.newaxis]).reshape(6, INPUTS).T
    assert np.abs(found - weights).max() <= np.abs(scale).max()  # one step, where a block's other end is cut
    assert off(found, weights) < 0.1


def test_the_allocator_stays_in_fp32(tmp_path: Path) -> None:
    path = saved(tmp_path)
    kept: dict[str, str] = {}
    changed = converted(path, lambda model: kept.update(to_int8("relevance_allocator", model, tmp_path)))
    assert set(kept) == {"plain", "head"}
    x = np.ones((1, INPUTS), np.float32)
    np.testing.assert_array_equal(run(changed, x), run(path, x))


def test_bf16_rounds_both_factors(tmp_path: Path) -> None:
    path = saved(tmp_path)
    changed = converted(path, round_to_bf16)
    x = np.random.default_rng(5).standard_normal((3, INPUTS)).astype(np.float32)
    first = numpy_helper.to_array(onnx.load(path).graph.initializer[0])

    def rounded(array: np.ndarray) -> np.ndarray:
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)

    (found,) = Graph(changed).run({"x": x}, ["one"])
    np.testing.assert_allclose(found, rounded(x) @ rounded(first), rtol=1e-5, atol=1e-4)
    assert off(found, x @ first) > 1e-4
