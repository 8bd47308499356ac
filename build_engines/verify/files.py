"""Check a repository's files, on any machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from build_engines.convert.manifest import NAME
from build_engines.convert.plans import HEADER_BYTES, version_of_plan
from build_engines.convert.precision import CACHED
from build_engines.convert.run import digests
from build_engines.convert.tensorrt_rules import MAY_VARY, faults
from build_engines.repository import CONFIG_TYPES, offered
from build_engines.verify.report import Report
from service.core.card import LLM_CLIPS, LLM_ENCODER, LLM_TOKENIZER, ModelCard
from service.core.tensors import Tensor
from service.core.vision import QUESTION_TOKENS
from service.text.prompt import PromptBuilder, load_tokenizer, token_bytes
from service.triton import CALLED

QUESTIONS = ("what colour is the small circle?", "Où est le 7 ?", "how many?")
ONNX_TYPES = {"float32": "FP32", "float16": "FP16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8"}

Specs = dict[str, tuple[str, tuple[int, ...], bool]]  # data type, shape without the batch, optional


class Wrong(Exception):
    """A check failed. The message says what is wrong."""


def check_files(repository: Path, report: Report) -> ModelCard | None:
    """Run every check of the files. Returns the card if it can be read."""
    card: ModelCard | None = None
    with report.check("card"):
        card = ModelCard.from_json((repository / "card.json").read_text())
    if card is None:
        return None
    with report.check("tokenizer"):
        check_tokenizer(repository, card)
    with report.check("template"):
        check_template(repository, card)
    configs: dict[str, Any] = {}
    with report.check("configurations"):
        configs = read_configs(repository)
        check_contract(configs, card)
    for name, config in configs.items():
        path = repository / name / "1"
        if (path / "model.onnx").exists():
            with report.check(f"graph {name}"):
                check_graph(path / "model.onnx", name, config, card)
        elif config.backend == "tensorrt":
            with report.check(f"plan {name}"):
                check_plan(path / config.default_model_filename, built_with(repository).get("tensorrt"))
        elif config.backend == "tensorrtllm":
            with report.check("engine llm"):
                check_engine(path, config, card)
    check_manifest(repository, report)
    return card


def check_tokenizer(repository: Path, card: ModelCard) -> None:
    """Check that the model knows every id, and that every token's bytes are known."""
    tokenizer = load_tokenizer(repository / LLM_TOKENIZER)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= card.vocab_size:
        raise Wrong(
            f"id {largest} would be read as a visual token: the vocabulary has {card.vocab_size}. "
            "Use the checkpoint's own tokenizer"
        )
    spelled = token_bytes(tokenizer)
    for question in QUESTIONS:
        ids = tokenizer.encode(question, add_special_tokens=False).ids
        text = b"".join(spelled[i] for i in ids)
        if text.decode(errors="replace").strip().lower() != question.lower():  # a tokenizer may have one case only
            raise Wrong(f"{question!r} comes back as {text!r}: use the checkpoint's own tokenizer")
    named = {} if card.image_marks is None else {f"image_marks.{k}": v for k, v in asdict(card.image_marks).items()}
    for name in ("bos_id", "end_id", "pad_id", "text_end_id", "decoder_start_id"):
        named[name] = getattr(card, name)
    for name, told in named.items():
        if told is not None and not 0 <= told < card.vocab_size:
            raise Wrong(f"{name} is {told}, not below {card.vocab_size}: correct the card")


def check_template(repository: Path, card: ModelCard) -> None:
    """Check that a question makes a prompt, and that the most visual tokens leave room for an answer."""
    if card.prompt_template.count("{question}") != 1:
        raise Wrong(f"prompt_template {card.prompt_template!r} must contain {{question}} once: correct the card")
    if card.system_template and card.system_template.count("{system}") != 1:
        raise Wrong(f"system_template {card.system_template!r} must contain {{system}} once, or be empty: correct it")
    prompts = PromptBuilder.load(card, repository)
    for text in QUESTIONS:
        question = prompts.question(text)
        if len(question.ids) != QUESTION_TOKENS or not question.mask.any():
            raise Wrong(f"{text!r} makes question_ids of {len(question.ids)}, {question.mask.sum()} of them real")
        table = np.zeros((card.visual_tokens[1], card.hidden_size), np.float32)
        prompt = prompts.compose(text, [(table, b"a key")])
        if len(prompt.input_ids) + 1 > card.max_positions:
            raise Wrong(f"{len(prompt.input_ids)} tokens of prompt leave no room in {card.max_positions} positions")


def read_configs(repository: Path) -> dict[str, Any]:
    """Read the configurations by model. Raises Wrong if Triton could not read one."""
    found = {}
    for path in sorted(repository.glob("*/config.pbtxt")):
        try:
            found[path.parent.name] = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        except text_format.ParseError as exc:
            raise Wrong(f"{path.parent.name}/config.pbtxt: {exc}") from exc
        if found[path.parent.name].name != path.parent.name:
            raise Wrong(f"{path.parent.name}/config.pbtxt has the name {found[path.parent.name].name}: rename it")
    return found


def specs(tensors: Any) -> Specs:
    """Inputs or outputs of a ModelConfig."""
    wire_types = {configured: datatype for datatype, configured in CONFIG_TYPES.items()}

    def datatype(each: Any) -> str:
        configured = model_config_pb2.DataType.Name(each.data_type).removeprefix("TYPE_")
        return wire_types.get(configured, configured)

    return {each.name: (datatype(each), tuple(each.dims), getattr(each, "optional", False)) for each in tensors}


def check_contract(configs: Mapping[str, Any], card: ModelCard) -> None:
    """Check the tensors between the gateway and the models, and between the steps of ensembles."""

    def told(tensor: Tensor) -> tuple[str, tuple[int | str, ...], bool]:
        sized = card.sized(tensor)
        return sized.datatype, sized.dims, sized.optional

    def used(tensors: Sequence[Tensor]) -> list[Tensor]:
        offers = {"top_log_probs": card.top_log_probs, "clip_weights": card.clip_weights}
        return [each for each in tensors if offered(each, **offers)]

    for name in {*card.called, "vision_encoder", *("vqa" for _ in configs if "vqa" in configs)}:
        if name not in configs:
            raise Wrong(f"the model {name} is missing")
        accepted, given = specs(configs[name].input), specs(configs[name].output)
        for tensor in used(CALLED[name].inputs):
            if accepted.get(tensor.name) != told(tensor):
                raise Wrong(
                    f"{name} takes {tensor.name} as {accepted.get(tensor.name)}, the gateway sends {told(tensor)}"
                )
        for tensor in used(CALLED[name].outputs):
            if given.get(tensor.name, ())[:2] != told(tensor)[:2]:
                raise Wrong(f"{name} gives {tensor.name} as {given.get(tensor.name)}, the gateway reads {told(tensor)}")
        unsent = {key for key, spec in accepted.items() if not spec[2]} - {t.name for t in CALLED[name].inputs}
        if unsent:
            raise Wrong(f"{name} requires {', '.join(sorted(unsent))}, which the gateway does not send")
    for config in configs.values():
        _check_steps(config, configs)


def fits(given: tuple[str, tuple[int, ...]], taken: tuple[str, tuple[int, ...]]) -> bool:
    """Whether a tensor's data type and shape fit. A given size of -1 fits any size."""
    return (
        given[0] == taken[0]
        and len(given[1]) == len(taken[1])
        and all(size in (-1, own) for own, size in zip(given[1], taken[1], strict=True))
    )


def _check_steps(config: Any, configs: Mapping[str, Any]) -> None:
    flowing = {name: spec[:2] for name, spec in specs(config.input).items()}
    for step in config.ensemble_scheduling.step:
        if step.model_name not in configs:
            raise Wrong(f"{config.name} has a step {step.model_name}, which is missing")
        inner = configs[step.model_name]
        inputs, outputs = specs(inner.input), specs(inner.output)
        if missing := {key for key, spec in inputs.items() if not spec[2]} - step.input_map.keys():
            raise Wrong(f"{config.name} gives {step.model_name} no {', '.join(sorted(missing))}")
        for key, value in step.input_map.items():
            if value not in flowing or not fits(flowing[value], inputs[key][:2]):
                raise Wrong(
                    f"{config.name}: {value} is {flowing.get(value)}, {step.model_name} takes {inputs[key][:2]}"
                )
        flowing |= {value: outputs[key][:2] for key, value in step.output_map.items()}
    if config.ensemble_scheduling.step:
        for name, spec in specs(config.output).items():
            if flowing.get(name) != spec[:2]:
                raise Wrong(f"{config.name} declares {name} as {spec[:2]}, its steps give {flowing.get(name)}")


def check_graph(path: Path, name: str, config: Any, card: ModelCard) -> None:
    """Check a whole ONNX file: the configuration's tensors, and TensorRT's rules."""
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    for constant in model.graph.initializer:
        for entry in constant.external_data:
            if entry.key == "location" and not (path.parent / entry.value).exists():
                raise Wrong(f"its weights file {entry.value} is missing")
    batched = config.max_batch_size > 0
    ins, outs = dict(_ends(model.graph.input, batched)), dict(_ends(model.graph.output, batched))
    if name == "llm":
        _check_language_model(path, ins, outs, card)
    elif name == "qformer" and "attend" in ins:  # a runner forms the groups of this graph
        wanted = (card.float_type, (card.queries, card.hidden_size))
        if outs.get("visual_tokens") != wanted:
            raise Wrong(f"it gives {outs}, not visual_tokens {wanted}")
    else:
        for told, found in ((specs(config.input), ins), (specs(config.output), outs)):
            if found != {key: spec[:2] for key, spec in told.items()}:
                raise Wrong(f"its tensors are {found}, the configuration has {told}")
    if name in MAY_VARY and (broken := faults(onnx.load(path), MAY_VARY[name])):
        raise Wrong(f"TensorRT would not build it: {'; '.join(broken[:3])}")


def _check_language_model(path: Path, ins: Mapping[str, Any], outs: Mapping[str, Any], card: ModelCard) -> None:
    """Check a decoder-only LLM's graph, or both of an LLM with a prompt reader."""
    if outs.get("logits") != ("FP32", (card.vocab_size,)):
        raise Wrong(f"its logits are {outs.get('logits')}, the vocabulary has {card.vocab_size}")
    if card.clip_weights:
        beside = path.with_name(LLM_CLIPS)
        if not beside.exists():
            raise Wrong(f"it has no {LLM_CLIPS} beside it, but the card has clip_weights. Build again")
        onnx.checker.check_model(beside)
        other = onnx.load(beside, load_external_data=False).graph
        if (dict(_ends(other.input)), dict(_ends(other.output))) != (dict(ins), dict(outs)):
            raise Wrong(f"{LLM_CLIPS} has other tensors than {path.name}. Build again")
    if card.decoder_start_id is not None or card.image_marks is not None:
        encoder = path.with_name(LLM_ENCODER)
        if not encoder.exists():
            raise Wrong(
                f"it has no {LLM_ENCODER} beside it, but the card's LLM ({card.architecture}) needs one. Build again"
            )
        onnx.checker.check_model(encoder)
        model = onnx.load(encoder, load_external_data=False)
        read, given = dict(_ends(model.graph.input)), dict(_ends(model.graph.output))
        if given.keys() != {key for key in ins if key.startswith(("cross_key_", "cross_value_"))}:
            raise Wrong(f"{LLM_ENCODER} gives {', '.join(sorted(given))}, which the decoder does not read")
        ins = {**ins, **read}
    if ins.get("prompt_embedding_table") != (card.float_type, (-1, card.hidden_size)):
        raise Wrong(f"its prompt_embedding_table is {ins.get('prompt_embedding_table')}")
    cached = {name for name in (*ins, *outs) if name.startswith(CACHED)}
    if (
        not cached
        or {name.replace("past", "new", 1) for name in cached if name.startswith("past")} != cached & outs.keys()
    ):
        raise Wrong("its keys and values must be pairs of past_* and new_*")


def _ends(values: Any, batched: bool = True) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Name, data type and shape of each tensor, without the batch dimension if there is one."""
    for value in values:
        tensor = value.type.tensor_type
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        if batched and dims[0] != -1:
            raise Wrong(f"the batch of {value.name} is fixed at {dims[0]}")
        yield value.name, (ONNX_TYPES.get(dtype, dtype), tuple(dims[1:] if batched else dims))


def built_with(repository: Path) -> dict[str, str]:
    """Versions by tool, from the manifest; empty without one."""
    path = repository / NAME
    return dict(json.loads(path.read_text())["versions"]) if path.exists() else {}


def check_plan(path: Path, tensorrt: str | None) -> None:
    """Check that the manifest's TensorRT built the plan: no other version can load it."""
    if not path.is_file():
        raise Wrong(f"{path.name} is missing")
    with path.open("rb") as plan:
        version = version_of_plan(plan.read(HEADER_BYTES))
    if version != tensorrt:
        raise Wrong(f"it was built by TensorRT {version}, the manifest says {tensorrt or 'nothing'}")


def check_engine(folder: Path, config: Any, card: ModelCard) -> None:
    """Check the engine's config.json: virtual ids must start at its vocabulary size."""
    told = json.loads((folder / "config.json").read_text())
    pretrained, build = told["pretrained_config"], told["build_config"]
    if pretrained["vocab_size"] != card.vocab_size:
        raise Wrong(f"the engine's visual ids start at {pretrained['vocab_size']}, the card's at {card.vocab_size}")
    if build["max_seq_len"] < card.max_positions:
        raise Wrong(f"the engine ends at {build['max_seq_len']} tokens, the card allows {card.max_positions}")
    if build["max_batch_size"] < config.max_batch_size:
        raise Wrong(
            f"the engine decodes {build['max_batch_size']} sequences at once, the configuration allows "
            f"{config.max_batch_size}"
        )
    if (rows := build["max_prompt_embedding_table_size"] // build["max_batch_size"]) < (card.most_visual_tokens or 1):
        raise Wrong(f"the engine takes {rows} visual tokens of a request, the card allows {card.most_visual_tokens}")
    ranks = pretrained["mapping"]["world_size"]
    missing = [f"rank{rank}.engine" for rank in range(ranks) if not (folder / f"rank{rank}.engine").exists()]
    if missing:
        raise Wrong(f"missing: {', '.join(missing)}")


def check_manifest(repository: Path, report: Report) -> None:
    """Check that the repository has exactly the files that were built."""
    if not (repository / NAME).exists():
        report.not_run("manifest", "there is none: build with `glimpse build`, which writes one")
        return
    with report.check("manifest"):
        told = json.loads((repository / NAME).read_text())
        found = {name: digest for name, digest in digests(repository).items() if name != NAME}
        found = {name: digest for name, digest in found.items() if "__pycache__" not in name}
        changed = sorted(name for name in told["files"].keys() & found.keys() if told["files"][name] != found[name])
        lost, new = sorted(told["files"].keys() - found.keys()), sorted(found.keys() - told["files"].keys())
        for what, names in (("changed", changed), ("lost", lost), ("added", new)):
            if names:
                raise Wrong(f"{what} since it was built: {', '.join(names[:5])}")
