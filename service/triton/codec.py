"""Turn the gateway's values into Triton's messages, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from service.core.answer import LogProb
from service.core.errors import InternalError
from service.core.models import Generation
from service.core.payer import NOBODY, PAYER, current
from service.core.prompt import Prompt, Question
from service.core.request import Budget
from service.core.tensors import CLIP_WEIGHTS, DATATYPES, DTYPES, LIKELIEST, VISION, Arrays
from service.core.vision import CELLS, GRID, Relevance, Seen, SeenClip, VisionFeatures, dense
from service.telemetry.tracing import TRACEPARENT, traceparent
from service.triton.contract import CALLED

_OUTPUTS = {
    name: [service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=output.name) for output in model.outputs]
    for name, model in CALLED.items()
}
_CONTENT = service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"]
_CONTENT_TAG = bytes([_CONTENT.number << 3 | 2])  # 2: a field with a length
_HALF_EXPONENT = np.uint16(0x7C00)  # bits of an FP16, all set in a NaN or an infinity
_LLM_TYPES = {tensor.name: DTYPES.get(tensor.datatype) for tensor in CALLED["llm"].inputs}


def request(model: str, tensors: Arrays, request_id: str = "", *, for_tensorrt_llm: bool = False) -> bytes:
    """Make a request and serialise it. The first dimension of every tensor is the batch, if the model has one.

    The LLM gives log probabilities only if `return_log_probs` is among the tensors, and those of the likeliest tokens
    only if `num_top_log_probs` is. The models record their spans below the current one.

    Protobuf's own serialiser would copy the tensors three times, into memory that grows meanwhile. Serialised messages
    may be joined (protobuf.dev/programming-guides/encoding, section Last One Wins), so each is copied once.
    """
    inputs: list[service_pb2.ModelInferRequest.InferInputTensor] = []
    contents: list[bytes | memoryview] = []
    for name, array in tensors.items():
        datatype = DATATYPES[array.dtype]
        inputs.append(service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=array.shape))
        content = memoryview(_strings(array)) if array.dtype == np.object_ else np.ascontiguousarray(array).data
        contents += [_CONTENT_TAG, _varint(content.nbytes), content]
    head = service_pb2.ModelInferRequest(
        model_name=model, id=request_id, inputs=inputs, outputs=_wanted(model, tensors, for_tensorrt_llm)
    )
    if CALLED[model].decoupled:
        # Without this parameter Triton drops an empty last response, and with it the end of the stream.
        head.parameters["triton_enable_empty_final_response"].bool_param = True
    if span := traceparent():
        head.parameters[TRACEPARENT].string_param = span
    if (payer := current.get()) != NOBODY:
        head.parameters[PAYER].string_param = str(payer)
    return b"".join([head.SerializeToString(), *contents])


def _varint(number: int) -> bytes:
    """Write a length as protobuf does: seven bits a byte, the lowest first."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


def clip_request(frames: Sequence[VisionFeatures], times: Sequence[float], question: Question, budget: Budget) -> bytes:
    """Make and serialise a request for `attend_clip`. It takes tens of milliseconds: use a thread."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "features": np.stack([dense(frame.features) for frame in frames]),
        "saliency": np.stack([frame.saliency for frame in frames]),
        "entropy": np.stack([frame.entropy for frame in frames]),
        "texture": np.stack([frame.texture for frame in frames]),
        "times": np.array(times, np.float32),
        "question_ids": question.ids,
        "question_mask": question.mask,
        "clip_budget": np.array(budget.vision_tokens, np.int32),
    }
    return request("attend_clip", tensors)


def _wanted(
    model: str, tensors: Arrays, for_tensorrt_llm: bool
) -> list[service_pb2.ModelInferRequest.InferRequestedOutputTensor]:
    if model != "llm":
        return _OUTPUTS[model]
    names = {"output_ids"}
    if for_tensorrt_llm:
        names.add("sequence_length")  # its backend fails every response to a request that does not ask for it
    if "return_log_probs" in tensors:
        names.add("output_log_probs")
    if "num_top_log_probs" in tensors:
        names |= LIKELIEST
    return [output for output in _OUTPUTS["llm"] if output.name in names]


def asked(question: Question, budget: Budget) -> dict[str, npt.NDArray[Any]]:
    return {
        "question_ids": question.ids[np.newaxis],
        "question_mask": question.mask[np.newaxis],
        "budget": budget.to_array()[np.newaxis],
    }


def require_consistent(prompt: Prompt) -> None:
    """Check what TensorRT-LLM's backend does not: it drops extra ids of the wrong length and ignores the table's size.

    Two images could then share keys and values. Raises InternalError, because the gateway made the prompt.
    """
    ids, extra, rows = prompt.input_ids, prompt.extra_ids, len(prompt.visual_tokens)
    if extra.shape != ids.shape:
        raise InternalError(f"{extra.size} extra ids for {ids.size} input ids")
    visual = extra > 0
    named = ids[visual]
    first = int(named.min(initial=np.iinfo(np.int32).max))
    if not np.array_equal(np.sort(named), np.arange(first, first + rows, dtype=np.int64)):
        raise InternalError(f"{len(named)} visual ids do not name the {rows} rows of the prompt embedding table")
    if ids[~visual].max(initial=-1) >= first:
        raise InternalError("an input id names a row of the prompt embedding table and has no extra id")
    if len(set(extra[visual].tolist())) < rows:  # the same image twice
        _, at, of = np.unique(extra[visual], return_index=True, return_inverse=True)
        table = prompt.visual_tokens[named - first]
        if not np.array_equal(table, table[at][of]):
            raise InternalError("two different visual tokens have one extra id")


def llm_inputs(generation: Generation, text_type: str = "UINT8") -> dict[str, npt.NDArray[Any]]:
    """Make the LLM's inputs. Sampling inputs without an effect are left out, so that a greedy request is small."""
    prompt, sampling = generation.prompt, generation.sampling
    numbers: dict[str, float] = {
        "input_lengths": prompt.input_ids.size,
        "request_output_len": sampling.max_tokens,
        "prompt_vocab_size": len(prompt.visual_tokens),
        "end_id": generation.end_id,
        "pad_id": generation.pad_id,
        "streaming": sampling.streaming,
        "temperature": sampling.temperature,
    }
    if sampling.temperature > 0:
        numbers |= {"runtime_top_k": sampling.top_k, "runtime_top_p": sampling.top_p, "seed": sampling.seed}
    if sampling.log_probs:
        numbers["return_log_probs"] = True
        if sampling.top_log_probs:
            numbers["num_top_log_probs"] = sampling.top_log_probs
    if prompt.clip_weights:
        numbers[CLIP_WEIGHTS] = True
    if sampling.repetition_penalty != 1.0:
        numbers["repetition_penalty"] = sampling.repetition_penalty
    if sampling.guide is not None:
        guide = {"guided_decoding_guide_type": sampling.guide.kind, "guided_decoding_guide": sampling.guide.text}
        texts = {name: _text(text, text_type) for name, text in guide.items()}
    else:
        texts = {}
    return texts | {
        "input_ids": prompt.input_ids[np.newaxis],
        "prompt_embedding_table": prompt.visual_tokens[np.newaxis],
        "prompt_table_extra_ids": prompt.extra_ids[np.newaxis],
        **{name: np.array([[number]], _LLM_TYPES[name]) for name, number in numbers.items()},
    }


def _text(text: str, text_type: str) -> npt.NDArray[Any]:
    """Return UTF-8 bytes uint8 [1, n], or one string [1, 1]."""
    encoded = text.encode(errors="replace")
    if text_type == "BYTES":
        return np.array([[encoded]], np.object_)
    return np.frombuffer(encoded, np.uint8)[np.newaxis]


def _strings(array: npt.NDArray[Any]) -> bytes:
    """Write strings as Triton does: each behind its length, 4 bytes, little-endian."""
    return b"".join(len(each).to_bytes(4, "little") + each for each in array.ravel())


def features(arrays: Arrays) -> list[VisionFeatures]:
    """Read the encoder's outputs -> one value for each row. Raises InternalError if they are not finite."""
    _require_finite(arrays["features"])
    rows = zip(*(arrays[tensor.name] for tensor in VISION), strict=True)
    return [VisionFeatures(*row) for row in rows]  # its fields are VISION, in order


def seen(arrays: Arrays, budget: Budget) -> Seen:
    """Read what the LLM sees of an image. Raises InternalError if it is not finite."""
    visual = arrays["visual_tokens"][0, : int(arrays["visual_count"][0, 0])]
    _require_finite(visual)
    relevance = Relevance(
        map=arrays["relevance"][0].reshape(GRID, GRID),
        scores=arrays["scores"][0].reshape(3, GRID, GRID),
        levels=arrays["levels"][0].reshape(CELLS, CELLS),
        tensions=arrays["tensions"][0],
    )
    return Seen(visual.copy(), relevance, budget)  # without the rows after the count


def seen_clip(arrays: Arrays, budget: Budget) -> SeenClip:
    """Read what the LLM sees of a clip. Raises InternalError if it is not finite."""
    _require_finite(arrays["visual_tokens"])
    frames = zip(*(arrays[name] for name in ("relevance", "scores", "levels")), strict=True)
    relevance = tuple(
        Relevance(
            map=places.reshape(GRID, GRID),
            scores=scores.reshape(3, GRID, GRID),
            levels=levels.reshape(CELLS, CELLS),
            tensions=arrays["tensions"],
        )
        for places, scores, levels in frames
    )
    return SeenClip(arrays["visual_tokens"], relevance, budget)


def _require_finite(array: npt.NDArray[Any]) -> None:
    """Raise InternalError for a NaN or an infinity, as FP16 gives if it overflows. It must not be cached."""
    if array.dtype == np.float16:  # 0.1 ms for the features; np.isfinite takes 0.9 ms
        finite = (array.view(np.uint16) & _HALF_EXPONENT) != _HALF_EXPONENT
    else:
        finite = np.isfinite(array)
    if not finite.all():
        raise InternalError("the vision models gave numbers that are not finite: try another image")


def tokens(response: Any) -> tuple[int, ...]:
    """Read new tokens from `output_ids` int32 [1, 1, n]; an empty response has none.

    TensorRT-LLM pads rows to the longest beam. There is one beam, so n is the number of tokens.
    """
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "output_ids":
            return tuple(memoryview(content).cast("i"))
    return ()


def outputs(model: str, response: service_pb2.ModelInferResponse) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs of a model of CALLED by name, read-only.

    Raises ValueError if one is missing or does not fit its shape or the contract's, as with another repository. If the
    process of a step ends, Triton 2.51 sometimes answers without outputs and without an error.
    """
    try:
        found = arrays(response)
    except LookupError as exc:
        raise ValueError(f"a response of an unknown data type: {exc}") from exc
    called = CALLED[model]
    if missing := [tensor.name for tensor in called.outputs if tensor.name not in found]:
        raise ValueError(f"a response without {', '.join(missing)}")
    rows = set()
    for tensor in called.outputs:
        dims, shape = (-1, *tensor.dims) if called.batched else tensor.dims, found[tensor.name].shape
        if not _fits(shape, dims):
            raise ValueError(f"a response whose {tensor.name} is {list(shape)}, not {list(dims)}")
        if dims[0] == -1:
            rows.add(shape[0])
    if len(rows) > 1:
        raise ValueError(f"a response whose outputs have {sorted(rows)} rows")
    return found


def _fits(shape: Sequence[int], dims: Sequence[int | str]) -> bool:
    """Compare a shape with the contract's. Letters and -1 stand for any size but 0."""
    return len(shape) == len(dims) and all(
        size > 0 and (dim in (size, -1) or isinstance(dim, str)) for size, dim in zip(shape, dims, strict=True)
    )


def tokens_with_log_probs(response: Any) -> tuple[tuple[int, ...], list[LogProb]]:
    """Read new tokens and their log probabilities, `output_log_probs` float32 [1, 1, n].

    TensorRT-LLM repeats those of the tokens before them, so the last n are read. `top_ids` int32 and `top_log_probs`
    float32 [1, 1, n, k] may be there too.
    """
    told = arrays(response)
    if not told:
        return (), []
    ids, values = told["output_ids"].ravel().tolist(), told["output_log_probs"].ravel().tolist()
    values = values[len(values) - len(ids) :]
    if "top_ids" not in told:
        return tuple(ids), list(map(LogProb, values))
    rows = zip(told["top_ids"][0, 0].tolist(), told["top_log_probs"][0, 0].tolist(), strict=True)
    tops = [tuple(zip(*row, strict=True)) for row in rows]
    return tuple(ids), list(map(LogProb, values, tops))


def arrays(response: service_pb2.ModelInferResponse) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs by name, read-only."""
    return {
        output.name: np.frombuffer(content, DTYPES[output.datatype]).reshape(tuple(output.shape))
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }
