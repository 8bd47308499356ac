"""Inspect a checkpoint by its small files and its weights' headers.

This takes seconds for any size.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, Blip2ForImageTextRetrieval, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from build_engines.convert.options import Refused
from build_engines.convert.source import BLIP2, IDEFICS, IMAGE_TEXT, INSTRUCT, Source
from build_engines.model.adapted import FIXED, WEIGHTS, Adapted
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.checkpoint import (
    ALLOCATOR,
    CLIP,
    CLIP_LANGUAGE,
    FAMILIES,
    HUB_FILES,
    HUB_NAME,
    end_of_answers,
    image_marks,
    load_allocator,
    model_card,
    preprocessing,
    text_positions,
    tokenizer_file,
    visual_width,
    vocabulary,
    why_not,
    why_not_pixels,
)
from build_engines.model.decoder import FIXED_ROPE
from build_engines.model.zero_shot import weight_files
from build_engines.repository import CLIP_GRAPH, CLIP_LLM
from service.core.vision import QUESTION_TOKENS
from service.text.prompt import load_tokenizer, token_bytes

Shape = tuple[int, ...]

SMALL_FILES = [pattern for pattern in HUB_FILES if pattern != "*.safetensors"]
# model_type of text_config, which selects the graph; IDEFICS has one configuration for everything
LANGUAGE_MODELS = {"opt": "OPT", "llama": "Llama", "t5": "FlanT5", "idefics": "IDEFICS"}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")  # converted with a library that is not installed here
NAMED_AT_MOST = 5  # tensors that an error message lists


def inspect(
    checkpoint: str,
    adapted: Path | None = None,
    zero_shot: bool = False,
    image_text: str = "",
    allow: Callable[[Mapping[str, int]], object] = lambda _: None,
) -> Source:
    """Inspect a directory, or a repository of the Hugging Face hub by name, and what its allocator is made of.

    That is its own, a folder `adapted` of `glimpse adapt`, its own Q-Former (`zero_shot`), or the Q-Former of another
    checkpoint (`image_text`). The weights are downloaded only after the other files have passed and `allow` has
    returned: it gets the parameters by component, as config.json tells them, and may raise Refused. Raises Refused with
    the reason for a checkpoint that cannot be built.
    """
    directory = _small_files(checkpoint)
    family = _family(directory)
    _check_reader(family, adapted, zero_shot, image_text)
    config = _config(directory)
    text = config.get_text_config()
    _check_sizes(directory, config)
    _check_pixels(directory, family)
    _check_tokenizers(directory, family, vocabulary(text))
    _check_end(directory, text)
    if family == IDEFICS:
        _check_marks(directory)
    wanted = _wanted(directory, FAMILIES[family], config)
    parameters = _parameters(wanted.shapes, family) | _parameters_for_clips(directory)
    if image_text:
        _check_image_text(image_text, config)
        other = _small_files(image_text)
        read = _wanted(other, Blip2ForImageTextRetrieval, _config(other))
        parameters["relevance_allocator"] = _parameters(read.shapes, IMAGE_TEXT)["qformer"]
    allow(parameters)
    directory = _whole(checkpoint, directory)
    _check_tensors(directory, wanted)
    reader = None
    if image_text:
        reader = _whole(image_text, other)
        _check_tensors(reader, read)
    allocator = _allocator(directory) if adapted is None else _adapted(adapted, config)
    zero_shot = zero_shot or bool(image_text)
    return Source(
        directory=directory,
        name=Path(checkpoint).name,
        family=family,
        language=text.model_type,
        vision_width=config.vision_config.hidden_size,
        hidden_size=visual_width(config),
        vocab_size=vocabulary(text),
        max_positions=text_positions(text),
        parameters=parameters | _parameters_for_clips(directory),
        language_layers=int(text.num_hidden_layers),
        closer_view=allocator.closer is not None and not zero_shot,
        clip=(directory / CLIP).exists(),
        clip_weights=(directory / CLIP_LANGUAGE).exists(),
        zero_shot=zero_shot,
        image_text=reader,
        allocator=adapted,
        files=tuple(sorted({path for pattern in HUB_FILES for path in directory.glob(pattern) if path.is_file()})),
    )


def _check_reader(family: str, adapted: Path | None, zero_shot: bool, image_text: str) -> None:
    """Raises Refused if no Q-Former that reads the question can say where to look, though one is asked to."""
    if zero_shot and (family not in INSTRUCT or adapted is not None or image_text):
        raise Refused(
            "--zero-shot needs an InstructBLIP checkpoint, whose Q-Former reads the question, and neither --allocator "
            "nor --image-text: leave it out. For a BLIP-2, use --image-text"
        )
    if image_text and (family != BLIP2 or adapted is not None):
        raise Refused(
            "--image-text needs a BLIP-2 checkpoint, whose Q-Former does not read the question, and no --allocator: "
            "leave it out. For an InstructBLIP, use --zero-shot"
        )


def _check_image_text(checkpoint: str, config: PreTrainedConfig) -> None:
    """Raises Refused for what is no image-text checkpoint, or has a vision encoder of other sizes than `config`.

    Whether the encoder's weights agree is seen when they are loaded.
    """
    directory = _small_files(checkpoint)
    _family(directory, (IMAGE_TEXT,))
    own = _config(directory)
    sizes = ("hidden_size", "num_hidden_layers", "image_size", "patch_size")
    odd = [name for name in sizes if getattr(own.vision_config, name) != getattr(config.vision_config, name)]
    if odd:
        raise Refused(
            f"{checkpoint} has another vision encoder (by its {', '.join(odd)}): use the image-text checkpoint of the "
            "same encoder"
        )
    words = own.qformer_config
    if not words.use_qformer_text_input or words.max_position_embeddings < QUESTION_TOKENS:
        raise Refused(
            f"{checkpoint} has a Q-Former that reads no text of {QUESTION_TOKENS} tokens: use another image-text "
            "checkpoint"
        )
    _check_words(directory, words.vocab_size)


def _small_files(checkpoint: str) -> Path:
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if not HUB_NAME.fullmatch(checkpoint):
        raise Refused(
            f"{checkpoint} is neither a directory nor a hub name: give one, such as Salesforce/blip2-opt-2.7b"
        )
    return _downloaded(checkpoint, SMALL_FILES)


def _whole(checkpoint: str, directory: Path) -> Path:
    """The checkpoint's folder with its weights. They are downloaded, if it is a name of the hub."""
    return directory if Path(checkpoint).is_dir() else _downloaded(checkpoint, HUB_FILES)


def _downloaded(checkpoint: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=patterns))
    except Exception as exc:  # huggingface_hub raises a dozen types, each with advice in the message
        raise Refused(f"{checkpoint} cannot be downloaded: {str(exc).splitlines()[0]}") from exc


def _family(directory: Path, known: Collection[str] = FAMILIES) -> str:
    """The first architecture of config.json that is known."""
    path = directory / "config.json"
    try:
        architectures = json.loads(path.read_text()).get("architectures") or []
    except FileNotFoundError:
        raise Refused(f"{directory} has no config.json: give a checkpoint directory in Hugging Face's format") from None
    except (OSError, ValueError, AttributeError) as exc:
        raise Refused(f"{path} cannot be read: {exc}. Download the checkpoint again") from exc
    for name in architectures:
        if name in known:
            return str(name)
    held = ", ".join(map(str, architectures)) or "no architecture"
    raise Refused(f"{directory} holds {held}: use a checkpoint of {' or '.join(known)}")


def _config(directory: Path) -> PreTrainedConfig:
    """Read config.json, with defaults for missing values."""
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as exc:  # wrong values make transformers raise many types
        raise Refused(f"{directory}/config.json cannot be used: {exc}. Correct it or use another checkpoint") from exc


def _check_sizes(directory: Path, config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    if why := why_not(config):
        raise Refused(f"{directory} {why}")
    if text.model_type not in LANGUAGE_MODELS:
        raise Refused(
            f"{directory} has a language model of type {text.model_type}: use one with "
            f"{', '.join(LANGUAGE_MODELS.values())} (Vicuna is a Llama)"
        )
    if text.model_type == "opt" and not text.do_layer_norm_before:
        raise Refused(f"{directory} has an OPT with layer norm after attention (OPT-350m): use another OPT")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if text.model_type in ("llama", "idefics") and rope_type not in FIXED_ROPE:
        raise Refused(
            f"{directory} has rotary positions of type {rope_type}, which change with the length: "
            f"use a model with one of {', '.join(FIXED_ROPE)}"
        )


def _check_pixels(directory: Path, family: str) -> None:
    if why := why_not_pixels(preprocessing(directory, FAMILIES[family])):
        raise Refused(f"{directory} {why}")


def _check_end(directory: Path, text: PreTrainedConfig) -> None:
    try:
        end_of_answers(directory, text, model_card(directory))
    except ValueError as exc:
        raise Refused(str(exc)) from exc


def _check_tokenizers(directory: Path, family: str, vocab_size: int) -> None:
    tokenizer = _read(directory, _with_bytes)
    if family in INSTRUCT:
        _read(directory / "qformer_tokenizer", load_tokenizer)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise Refused(
            f"{directory} has a tokenizer that goes up to id {largest}, but the language model has {vocab_size} ids, "
            "and larger ones would be read as visual tokens. Use the tokenizer of this language model"
        )


def _check_words(directory: Path, vocab_size: int) -> None:
    """Raises Refused if a text can have ids that the Q-Former does not know. Special tokens such as <image> cannot."""
    tokenizer = _read(directory, load_tokenizer)
    added = [number for number, token in tokenizer.get_added_tokens_decoder().items() if not token.special]
    largest = max([*tokenizer.get_vocab(with_added_tokens=False).values(), *added], default=-1)
    if largest >= vocab_size:
        raise Refused(
            f"{directory} has a tokenizer that goes up to id {largest}, but the Q-Former has {vocab_size} ids. Use the "
            "tokenizer of this Q-Former"
        )


def _check_marks(directory: Path) -> None:
    try:
        image_marks(directory, 0)
    except ValueError as exc:
        raise Refused(str(exc)) from exc


def _with_bytes(path: Path) -> Tokenizer:
    """Load the tokenizer of a language model, whose tokens must have bytes."""
    tokenizer = load_tokenizer(path)
    token_bytes(tokenizer)
    return tokenizer


def _read(folder: Path, load: Callable[[Path], Tokenizer]) -> Tokenizer:
    """Read the folder's tokenizer, in any of its formats. Raises Refused if there is none, or if it cannot be read."""
    found = [name for name in (*TOKENIZER_FILES, *SENTENCEPIECE_FILES) if (folder / name).exists()]
    if not found:
        raise Refused(f"{folder} has no tokenizer: add one of {', '.join(TOKENIZER_FILES)}")
    if found[0] in SENTENCEPIECE_FILES:
        raise Refused(
            f"{folder} has a {found[0]} but no tokenizer.json, which Glimpse needs. Where transformers and "
            "sentencepiece are installed, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it"
        )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return load(tokenizer_file(folder, Path(scratch) / TOKENIZER_FILES[0]))
    except Exception as exc:  # tokenizers raises bare Exception, and conversions many types
        raise Refused(f"{folder}/{found[0]} cannot be used: {exc}. Replace it with the checkpoint's own file") from exc


def _stored_shapes(directory: Path) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every stored tensor, from the headers alone."""
    for name in weight_files(directory):
        if not (directory / name).exists():
            raise Refused(f"{directory} has no {name}: weights must be in safetensors files")
        try:
            with safe_open(directory / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    yield tensor, tuple(file.get_slice(tensor).get_shape())
        except (SafetensorError, OSError) as exc:
            raise Refused(f"{directory / name} cannot be read, it may be cut short: {exc}. Download it again") from exc


@dataclass(frozen=True)
class _Wanted:
    """The tensors of the model that config.json describes."""

    shapes: Mapping[str, Shape]  # of tied tensors, only the one that transformers itself stores
    tied: Mapping[str, str]  # the other names of tied tensors -> the name in `shapes`


def _wanted(directory: Path, family: type[Any], config: PreTrainedConfig) -> _Wanted:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = family(config)
    except Exception as exc:  # wrong values make transformers raise many types
        raise Refused(f"{directory}/config.json describes no model: {exc}. Correct it") from exc
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return _Wanted(shapes, tied)


def _check_tensors(directory: Path, wanted: _Wanted) -> None:
    """Raises Refused for missing tensors and other shapes. Tied tensors may be stored under any of their names."""
    kept = dict(_stored_shapes(directory))
    for name, stored_as in wanted.tied.items():
        if name in kept:
            kept.setdefault(stored_as, kept[name])
    missing = sorted(wanted.shapes.keys() - kept.keys())
    if missing:
        raise Refused(
            f"{directory} lacks {len(missing)} of {len(wanted.shapes)} tensors: {_few(missing)}. Download the "
            "checkpoint again"
        )
    odd = [
        f"{name} is {list(kept[name])}, not {list(shape)}"
        for name, shape in wanted.shapes.items()
        if kept[name] != shape
    ]
    if odd:
        raise Refused(
            f"{directory}: {len(odd)} tensors do not fit config.json: {_few(odd)}. "
            "Use the config.json and weights of one checkpoint"
        )


def _allocator(directory: Path) -> RelevanceAllocator:
    try:
        return load_allocator(directory / ALLOCATOR)
    except (ValueError, SafetensorError, OSError) as exc:
        raise Refused(str(exc)) from exc


def _adapted(folder: Path, config: PreTrainedConfig) -> RelevanceAllocator:
    """The allocator in a folder of `glimpse adapt`. Raises Refused for one of other sizes."""
    try:
        told = Adapted.read(folder)
        found = RelevanceAllocator(None) if told.state == FIXED else load_allocator(folder / WEIGHTS)
    except (ValueError, SafetensorError, OSError) as exc:
        raise Refused(str(exc)) from exc
    width = config.vision_config.hidden_size
    if found.participatory is not None and found.participatory.patch_norm.normalized_shape != (width,):
        raise Refused(
            f"{folder} was adapted to an encoder of another width than {width}: give the allocator of this checkpoint"
        )
    return found


def _few(names: list[str]) -> str:
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _parameters_for_clips(directory: Path) -> dict[str, int]:
    """Count what only clips and several images use, by the graphs that a build makes of it."""
    counts = {}
    for graph, name in ((CLIP_GRAPH, CLIP), (CLIP_LLM, CLIP_LANGUAGE)):
        if (directory / name).exists():
            with safe_open(directory / name, framework="pt") as file:
                keys = file.keys()
                counts[graph] = sum(int(torch.Size(file.get_slice(key).get_shape()).numel()) for key in keys)
    return counts


def _parameters(shapes: Mapping[str, Shape], family: str) -> dict[str, int]:
    counts = {"vision_encoder": 0, "qformer": 0, "llm": 0}
    named = {"vision_model": "vision_encoder", "language_model": "llm", "perceiver_resampler": "qformer"}
    other = "llm" if family == IDEFICS else "qformer"
    for name, shape in shapes.items():
        head = name.removeprefix("model.").split(".")[0]
        counts[named.get(head, other)] += int(torch.Size(shape).numel())
    return counts
