"""What a config.pbtxt may say to a model, and what holds where it says nothing."""

import json
import os
from pathlib import Path

import pytest

from tests.support.fakes import CARD
from triton_models.parameters import Parameters


def parameters(
    folder: Path = Path("/models/llm"), *, args: dict[str, str] | None = None, **config: object
) -> Parameters:
    told = {"input": [{"name": "a"}, {"name": "b"}], "output": [{"name": "c"}]} | config
    named = {"model_repository": str(folder), "model_version": "3", "model_config": json.dumps(told)}
    return Parameters(named | (args or {}))


def saying(**values: str) -> Parameters:
    return parameters(parameters={name: {"string_value": value} for name, value in values.items()})


def test_the_folders_are_those_of_the_model_its_version_and_its_repository():
    found = parameters()
    assert (found.folder, found.version) == (Path("/models/llm"), Path("/models/llm/3"))
    assert found.repository == Path("/models")
    assert (found.inputs, found.outputs) == (["a", "b"], ["c"])


def test_a_configuration_that_says_little_is_one_unbatched_cpu_instance():
    found = parameters()
    assert (found.device_id, found.max_batch_size, found.intra_op_threads, found.nice) == (0, 0, 1, 0)
    assert found.text("graph", "x") == "x"
    assert found.graph == Path("/models/llm/3/model.onnx")


def test_what_is_said_holds():
    assert parameters(max_batch_size=8).max_batch_size == 8
    assert parameters(args={"model_instance_device_id": "2"}).device_id == 2
    found = saying(graph="other.onnx", nice="5", intra_op_threads="3", max_rows="4")
    assert found.graph == Path("/models/llm/3/other.onnx")
    assert (found.nice, found.intra_op_threads, found.integer("max_rows", 9)) == (5, 3, 4)


@pytest.mark.parametrize(
    ("groups", "instances"),
    [([], 1), ([{}], 1), ([{"count": 2}], 2), ([{"count": 2}, {"count": 3}, {}], 6), ([{"count": 0}], 1)],
)
def test_no_threads_mean_all_cores_divided_among_the_instances(groups, instances):
    cores = len(os.sched_getaffinity(0))
    found = parameters(parameters={"intra_op_threads": {"string_value": "0"}}, instance_group=groups)
    assert found.intra_op_threads == max(1, cores // instances)


def test_a_number_below_the_least_fails_the_load():
    assert saying(rows="1").integer("rows", 5) == 1
    assert saying(rows="0").integer("rows", 5, least=0) == 0
    assert saying().integer("rows", 5) == 5
    with pytest.raises(ValueError, match=r"^parameter rows of llm must be at least 1, not 0$"):
        saying(rows="0").integer("rows", 5)
    with pytest.raises(ValueError, match="at least 4, not 3"):
        saying(rows="3").integer("rows", 5, least=4)
    with pytest.raises(ValueError, match="at least 0, not -1"):
        _ = saying(nice="-1").nice
    with pytest.raises(ValueError, match="at least 0, not -1"):
        _ = saying(intra_op_threads="-1").intra_op_threads
    with pytest.raises(ValueError, match="'many'"):
        saying(rows="many").integer("rows", 5)


def test_yes_is_yes_and_no_is_no_and_nothing_else_is_either():
    assert saying(fast="yes").yes("fast") is True
    assert saying(fast="no").yes("fast") is False
    assert saying().yes("fast") is False
    with pytest.raises(ValueError, match=r"^parameter fast of llm must be yes or no, not true$"):
        saying(fast="true").yes("fast")


def test_the_card_lies_beside_the_model(tmp_path):
    fields = {name: getattr(CARD, name) for name in CARD.__slots__}
    (tmp_path / "card.json").write_text(json.dumps(fields))
    assert parameters(tmp_path / "llm").card() == CARD
    with pytest.raises(FileNotFoundError):
        parameters(tmp_path / "elsewhere" / "llm").card()
