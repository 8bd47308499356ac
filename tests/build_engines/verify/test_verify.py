"""`glimpse verify` on the committed repository, files and served, and on damaged ones."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from build_engines.convert.run import digests
from build_engines.verify.__main__ import main
from build_engines.verify.files import check_engine, check_files, read_configs
from build_engines.verify.live import Served, check_served, gpu_memory
from build_engines.verify.report import Report
from build_engines.verify.serve import CannotServe, Images, containers, started
from service.core.card import ModelCard
from service.triton import TritonClient
from service.triton_server.access import Ports
from service.triton_server.supervision import EmbeddedTriton
from tests.support.servers import free_ports

ROOT = Path(__file__).parents[3]


def states(report: Report) -> dict[str, str]:
    return {check.name: check.state for check in report.checks}


def test_the_reference_repositorys_files_are_right(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(repository)]) == 0
    told = capsys.readouterr().out
    for name in ("card", "tokenizer", "template", "configurations", "graph vision_encoder", "graph llm"):
        assert f"ok       {name}\n" in told
    assert "fit to serve" in told
    assert "not run here:" in told  # checks that did not run are listed


@pytest.mark.asyncio(loop_scope="session")
async def test_the_reference_repository_serves_what_its_graphs_say(
    repository: Path, card: ModelCard, triton: EmbeddedTriton, tmp_path: Path
) -> None:
    url = triton.access.url
    metrics = f"http://127.0.0.1:{triton.access.ports.metrics}/metrics"
    report = Report()
    await check_served(repository, card, Served(url, url, metrics, repository, None, scenes=4, repeats=2), report)
    assert report.failed == []
    found = states(report)
    assert {f"{model} infers" for model in card.called} <= found.keys()
    assert found["answers are those of FP32"] == "ok"
    assert found["GPU memory"] == "not run"
    assert report.measured["visual_tokens_parity"]["least_cosine"] > 0.9999
    assert report.measured["answers_agree"] == 1.0
    assert report.measured["encoder_ms"].keys() == {"1", "2", "4", "8", "16", "32"}
    for times in report.measured["encoder_ms"].values():
        assert all(value > 0 for value in times.values())
    assert all(value > 0 for value in report.measured["chain"].values())
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == report.verdict


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """A repository with a manifest, which a test can damage."""
    target = tmp_path / "copy"
    shutil.copytree(repository, target, ignore=shutil.ignore_patterns("__pycache__", "manifest.json"))
    (target / "manifest.json").write_text(json.dumps({"profile": "embedded", "files": digests(target)}))
    return target


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def swap_graphs(folder: Path) -> None:
    shutil.copyfile(folder / "qformer/1/model.onnx", folder / "vision_encoder/1/model.onnx")


def cut_a_graph(folder: Path) -> None:
    path = folder / "llm/1/model.onnx"
    path.write_bytes(path.read_bytes()[:1000])


def lose_weights(folder: Path) -> None:
    path = folder / "llm/1/model.onnx"
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="llm.onnx.data")
    (path.parent / "llm.onnx.data").unlink()


WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no card": (lambda d: (d / "card.json").unlink(), "card", "No such file"),
    "a card that is none": (lambda d: (d / "card.json").write_text("{}"), "card", "not a model card"),
    "a smaller vocabulary": (
        lambda d: edit(d / "card.json", '"vocab_size": 461', '"vocab_size": 400'), "tokenizer", "as a visual token",
    ),
    "an end that is no token": (lambda d: edit(d / "card.json", '"end_id": 2', '"end_id": 999'), "tokenizer", "end_id"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer", "tokenizer.json|No such file"),
    "a template without a question": (lambda d: edit(d / "card.json", "{question}", ""), "template", "question"),
    "a template without its message": (
        lambda d: edit(d / "card.json", '"system_template": ""', '"system_template": "x"'), "template", "{system}",
    ),
    "no room": (
        lambda d: edit(d / "card.json", '"max_positions": 320', '"max_positions": 40'), "template", "leave no room",
    ),
    "a configuration that is none": (
        lambda d: (d / "see/config.pbtxt").write_text("max_batch_size: many"), "configurations", "see/config.pbtxt",
    ),
    "a tensor of another type": (
        lambda d: edit(d / "llm/config.pbtxt", "TYPE_UINT64", "TYPE_INT64"), "configurations", "INT64",
    ),
    "a step that is not there": (
        lambda d: shutil.rmtree(d / "relevance_allocator"), "configurations", "relevance_allocator",
    ),
    "a card of another float": (
        lambda d: edit(d / "card.json", '"float_type": "FP32"', '"float_type": "FP16"'), "configurations", "FP16",
    ),
    "graphs mixed up": (swap_graphs, "graph vision_encoder", "its tensors are"),
    "a graph cut short": (cut_a_graph, "graph llm", ""),
    "no weights for clips": (lambda d: (d / "llm/1/clips.onnx").unlink(), "graph llm", "no clips.onnx beside it"),
    "other weights for clips": (
        lambda d: shutil.copyfile(d / "qformer/1/model.onnx", d / "llm/1/clips.onnx"), "graph llm", "other tensors",
    ),
    "weights lost": (lose_weights, "graph llm", "llm.onnx.data"),
    "a file changed": (
        lambda d: edit(d / "prepare/1/model.py", "Triton", "Trition"), "manifest", "changed .*prepare/1/model.py",
    ),
    "a file lost": (lambda d: (d / "vqa/1/.gitkeep").unlink(), "manifest", "lost .*vqa"),
    "a file added": (lambda d: (d / "llm/1/model.plan").write_text(""), "manifest", "added .*model.plan"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_repository_is_found(copy: Path, fault: str) -> None:
    spoil, name, told = WRONG[fault]
    spoil(copy)
    report = Report()
    check_files(copy, report)
    assert name in {check.name for check in report.failed}, report.text()
    (first,) = (check for check in report.failed if check.name == name)
    assert re.search(told, first.told), first.told
    assert report.verdict.startswith("NOT fit to serve")


def test_an_engine_is_held_against_the_card(repository: Path, card: ModelCard, tmp_path: Path) -> None:
    told = {
        "pretrained_config": {"vocab_size": card.vocab_size, "mapping": {"world_size": 1}},
        "build_config": {
            "max_seq_len": card.max_positions,
            "max_batch_size": 64,
            "max_prompt_embedding_table_size": 64 * 512,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(told))
    config = read_configs(repository)["llm"]
    with pytest.raises(Exception, match=r"missing: rank0\.engine"):
        check_engine(tmp_path, config, card)
    (tmp_path / "rank0.engine").write_bytes(b"")
    check_engine(tmp_path, config, card)
    with pytest.raises(Exception, match="visual ids start at"):
        check_engine(tmp_path, config, replace(card, vocab_size=card.vocab_size + 1))
    with pytest.raises(Exception, match="the engine ends at"):
        check_engine(tmp_path, config, replace(card, max_positions=card.max_positions + 1))
    check_engine(tmp_path, config, replace(card, most_visual_tokens=512))
    with pytest.raises(Exception, match="the engine takes 512 visual tokens of a request, the card allows 544"):
        check_engine(tmp_path, config, replace(card, most_visual_tokens=544))


def test_plans_are_served_by_two_containers(card: ModelCard, tmp_path: Path) -> None:
    ports = (Ports(2, 3), Ports(5, 6))
    vision, llm = containers(tmp_path, card, Images("vision:tag", "llm:tag", "/repository"), ports)
    for line, image, loads, port in ((vision, "vision:tag", ["see", "attend"], 2), (llm, "llm:tag", ["llm"], 5)):
        assert line[:5] == ["docker", "run", "--rm", "--gpus", "all"]
        assert f"{tmp_path}:/repository:ro" in line
        assert f"127.0.0.1:{port}:8001" in line
        server = line[line.index(image) + 1 :]
        assert server[0] == "tritonserver"
        assert [word for word in server if word.startswith("--load-model=")][: len(loads)] == [
            f"--load-model={model}" for model in loads
        ]


SERVER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import grpc

port, other, report = sys.argv[1:]
call = "/inference.GRPCInferenceService/ServerReady"
if other:
    Path(report).write_bytes(grpc.insecure_channel(f"127.0.0.1:{other}").unary_unary(call)(b"", timeout=5))
answer = grpc.unary_unary_rpc_method_handler(lambda *_: b"\\x08\\x01")  # ready: true
server = grpc.server(ThreadPoolExecutor(1))
handler = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ServerReady": answer})
server.add_generic_rpc_handlers([handler])
server.add_insecure_port(f"127.0.0.1:{port}")
server.start()
server.wait_for_termination()
"""


@pytest.mark.asyncio(loop_scope="session")
async def test_the_llms_server_starts_once_the_vision_server_is_ready(tmp_path: Path) -> None:
    """TensorRT-LLM takes most of the memory that is free at its start."""
    first, second = free_ports(2)
    found = tmp_path / "found"
    lines = [
        [sys.executable, "-c", SERVER, str(first), "", str(found)],
        [sys.executable, "-c", SERVER, str(second), str(first), str(found)],
    ]
    urls = [f"127.0.0.1:{port}" for port in (first, second)]
    async with started(lines, urls, tmp_path / "log"):
        assert found.read_bytes() == b"\x08\x01"
        async with TritonClient(*urls) as client:
            assert await client.ready()
    async with TritonClient(*urls) as client:
        assert not await client.ready()  # both are stopped
    lines[1] = [sys.executable, "-c", "exit(1)"]
    with pytest.raises(CannotServe, match="a server exited while starting"):
        async with started(lines, urls, tmp_path / "log"):
            pass


def test_a_repository_of_plans_says_what_serves_it(tmp_path: Path) -> None:
    assert Images.of(tmp_path) is None
    told = {"profile": "tensorrt", "images": {"llm": "b:2", "mount": "/m", "vision": "a:1"}}
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    assert Images.of(tmp_path) == Images(vision="a:1", llm="b:2", mount="/m")


def test_gpu_memory_is_read_of_tritons_metrics(tmp_path: Path) -> None:
    lines = ['nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 5368709120.000000', 'nv_gpu_utilization{gpu_uuid="GPU-1"} 0']
    text = "\n".join(["# HELP nv_gpu_memory_used_bytes", *lines, ""])
    (tmp_path / "metrics").write_text(text)
    assert gpu_memory((tmp_path / "metrics").as_uri()) == {"GPU-1": 5368709120.0}
    assert gpu_memory(None) is None
