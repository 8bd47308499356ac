"""Serve the `llm` model: requests become sequences, events become responses."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from service.core.card import LLM_TOKENIZER
from service.core.errors import InvalidRequest
from service.core.guide import GUIDE, MAX_GUIDE_BYTES, Guide
from service.core.payer import NOBODY, Payer
from service.core.prompt import Prompt
from service.core.request import MAX_TOP_LOG_PROBS, Sampling
from service.core.tensors import CLIP_WEIGHTS
from triton_models import spans
from triton_models.batcher import Batcher, Closed, Event, Limits, QueueFull, Sequence
from triton_models.costs import Costs, ServerCpu, payer_of
from triton_models.delivery import Delivery
from triton_models.gauges import Gauges
from triton_models.guiding import Guiding
from triton_models.language_model import open_language_model
from triton_models.parameters import Parameters
from triton_models.prefix_cache import naming_rows
from triton_models.tensors import read, write

if TYPE_CHECKING:
    from opentelemetry.trace import Span

LOG_PROBS = {"cum_log_probs", "output_log_probs"}  # outputs
# The gateway's bounds, in FP32 as they arrive. Far beyond them scores are infinite, and a constraint is lost.
LEAST_PENALTY, MOST_PENALTY = float(np.float32(0.01)), 10.0
# Triton's error codes by gRPC's names, which clients know.
TRITON_CODES = {"INTERNAL": "INTERNAL", "INVALID_ARGUMENT": "INVALID_ARG", "UNAVAILABLE": "UNAVAILABLE"}


@dataclass(slots=True, eq=False)
class Caller:
    """The receiver of a sequence's tokens and the outputs that it requested."""

    sender: Any
    outputs: tuple[str, ...]
    payer: Payer = NOBODY
    streaming: bool = True  # True: responses while it decodes; False: one response at the end
    interval_s: float = 0.0  # least time between two responses: a token that comes sooner waits for the next one
    untold: list[Event] = field(default_factory=list)  # not sent yet
    told_at: float = -math.inf  # monotonic time of the last response
    span: Span | None = None  # of the whole sequence, if its request is traced; None once it has ended
    generated: int = 0  # tokens so far

    def say(self, event: Event) -> None:
        """Send or collect one event; the last response carries the flag that ends the stream."""
        self.generated = event.generated
        if self.span is not None and event.token is not None and event.generated == 1:
            self.span.add_event("first_token")
        if event.error is not None:
            self.fail(event.error, event.code, "decoder" if event.code == "INTERNAL" else "constraint")
        elif event.token is None:
            self.end()
        else:
            if event.finished:
                self._end_span()
            self.untold.append(event)
            if event.finished or (self.streaming and time.monotonic() - self.told_at >= self.interval_s):
                self._respond()

    def _end_span(self, fault: str = "") -> None:
        span, self.span = self.span, None
        if span is not None:
            span.set_attribute("glimpse.completion_tokens", self.generated)
            spans.end(span, fault)

    def _respond(self) -> None:
        last = self.untold[-1]
        values = {
            "output_ids": np.array([[[event.token for event in self.untold]]], np.int32),
            "sequence_length": np.array([[last.generated]], np.int32),
            "cum_log_probs": np.array([[last.total_log_prob]], np.float32),
            "output_log_probs": np.array([[[event.log_prob for event in self.untold]]], np.float32),
            "top_ids": self._likeliest(0, np.int32),
            "top_log_probs": self._likeliest(1, np.float32),
        }
        self.untold.clear()
        self.told_at = time.monotonic()
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last.finished else 0
        self.sender.send(pb_utils.InferenceResponse([write(name, values[name]) for name in self.outputs]), flags)

    def _likeliest(self, column: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return ids or log probabilities of the likeliest tokens: [1, 1, tokens, k]; k is 0 if none are asked for."""
        told = [() if event.likeliest is None else event.likeliest[column] for event in self.untold]
        return np.array([[told]], dtype)

    def fail(self, message: str, code: str, fault: str) -> None:
        """End the stream with an error; `code` is one of TRITON_CODES, `fault` a word for the span.

        A stream transports only an error's text, so the text begins with the code.
        """
        self._end_span(fault)
        error = pb_utils.TritonError(f"{code}: {message}", getattr(pb_utils.TritonError, TRITON_CODES[code]))
        try:
            self._tell_the_rest()
        finally:
            self.sender.send(
                pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )

    def refuse(self, error: Exception) -> None:
        """End the stream of a request that the batcher does not take."""
        fault = type(error).__name__
        if isinstance(error, InvalidRequest):
            self.fail(error.message, "INVALID_ARGUMENT", fault)
        else:
            self.fail(str(error), "UNAVAILABLE" if isinstance(error, QueueFull | Closed) else "INTERNAL", fault)

    def end(self) -> None:
        self._end_span()
        try:
            self._tell_the_rest()
        finally:
            self.sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _tell_the_rest(self) -> None:
        if self.untold and self.streaming:
            self._respond()

    def is_gone(self) -> bool:
        try:
            return bool(self.sender.is_cancelled())
        except Exception:  # Triton has already forgotten the request
            return True


class TritonPythonModel:
    """Queue requests in `execute`; one thread runs the batcher's loop, others send responses."""

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = Parameters(args)
        os.nice(parameters.nice)  # applies to this thread and to those that it starts from here on
        card = parameters.card()
        decoder = open_language_model(
            parameters.graph,
            card,
            max_rows=parameters.integer("max_rows", 32),
            intra_op_threads=parameters.intra_op_threads,
            prefix_cache_bytes=parameters.integer("prefix_cache_bytes", 0, least=0),
            library=parameters.library,
            provider=parameters.text("provider", "cpu"),
            device_id=parameters.device_id,
        )
        limits = Limits(
            max_queue=parameters.integer("max_queue", 64),
            max_prefill_tokens=parameters.integer("max_prefill_tokens", 160),
        )
        self._reader = RequestReader(
            decoder.vocab_size, decoder.hidden_size, card.max_positions, ends_with_text=card.image_marks is not None
        )
        self._outputs = tuple(parameters.outputs)
        self._interval_s = parameters.integer("stream_interval_ms", 20, least=0) / 1e3
        self._delivery = Delivery(self._say)
        self._batcher = Batcher(decoder, limits, _is_abandoned)
        self._guiding = Guiding(
            parameters.repository / LLM_TOKENIZER,
            decoder.vocab_size,
            card.end_id,
            max_waiting=limits.max_queue,
            submit=self._batcher.submit,
            refuse=lambda sequence, error: _refuse(sequence.owner, error),
            is_abandoned=_is_abandoned,
        )
        self._gauges = Gauges(self._batcher, decoder.prefixes)
        self._costs = Costs("llm", on_gpu=parameters.text("provider", "cpu") != "cpu", server=ServerCpu())
        self._costs.start()
        self._loop = threading.Thread(target=self._run, name="llm-loop", daemon=True)
        self._loop.start()

    def execute(self, requests: SequenceOf[Any]) -> None:
        for request in requests:
            asked = request.requested_output_names()
            caller = Caller(request.get_response_sender(), tuple(name for name in self._outputs if name in asked))
            caller.interval_s = self._interval_s
            try:
                self._take(request, caller)
            except Exception as error:  # whatever it was, it ends this request only
                _refuse(caller, error)

    def finalize(self) -> None:
        """Stop the loop after its current iteration; unfinished sequences get an error."""
        self._guiding.close()
        self._batcher.close()
        self._loop.join()
        self._delivery.close()
        self._gauges.close()
        self._costs.close()
        for sequence in self._batcher.drain():
            with contextlib.suppress(Exception):  # the caller may be gone
                sequence.owner.fail("the model is being unloaded", "UNAVAILABLE", Closed.__name__)
        spans.close("llm")

    def _take(self, request: Any, caller: Caller) -> None:
        inputs = {tensor.name(): read(tensor) for tensor in request.inputs()}
        if "stop" in inputs and inputs["stop"].any():
            if not request.request_id():  # it would end every request without an id
                raise InvalidRequest("stop needs the id of the request to end: set the request id", param="stop")
            self._guiding.stop(request.request_id())
            self._batcher.stop(request.request_id())
            caller.end()
        else:
            caller.span = spans.begin("llm", request)
            sequence = self._reader.read(request.request_id(), inputs)
            sequence.sampling = replace(sequence.sampling, log_probs=not LOG_PROBS.isdisjoint(caller.outputs))
            sequence.owner, caller.streaming = caller, sequence.sampling.streaming
            caller.payer = payer_of(request)
            if caller.span is not None:
                caller.span.set_attribute("glimpse.prompt_tokens", sequence.prompt.input_ids.size)
            if sequence.sampling.guide is None:
                self._batcher.submit(sequence)
            else:
                self._guiding.submit(sequence)

    def _run(self) -> None:
        while self._batcher.wait():
            self._costs.begin()
            events = self._batcher.iterate()
            self._costs.end((sequence.owner.payer, tokens) for sequence, tokens in self._batcher.read)
            self._delivery.hand_out(events)

    def _say(self, event: Event) -> None:
        try:
            event.sequence.owner.say(event)
        except Exception as error:  # a failed send ends this sequence only
            pb_utils.Logger.log_warn(f"llm: sending to request {event.sequence.request_id!r} failed: {error}")
            event.sequence.cancelled = True


def _is_abandoned(sequence: Sequence) -> bool:
    gone: bool = sequence.owner.is_gone()
    return gone


def _refuse(caller: Caller, error: Exception) -> None:
    if not isinstance(error, InvalidRequest | QueueFull | Closed):
        pb_utils.Logger.log_warn(f"llm: a request cannot be taken: {type(error).__name__}: {error}")
    with contextlib.suppress(Exception):  # the caller may be gone
        caller.refuse(error)


class RequestReader:
    """Turn input tensors (first dimension: batch of 1) into a Sequence.

    Raises InvalidRequest, whose text goes to the client.
    """

    def __init__(self, vocab_size: int, hidden_size: int, max_positions: int, *, ends_with_text: bool = False) -> None:
        """`ends_with_text` says that the LLM cannot answer directly after a visual token (IDEFICS)."""
        self._ends_with_text = ends_with_text
        self._vocab_size = vocab_size
        self._hidden_size = hidden_size
        self._max_positions = max_positions

    def read(self, request_id: str, inputs: Mapping[str, Any]) -> Sequence:
        if "input_ids" not in inputs or inputs["input_ids"].shape[0] != 1:
            raise InvalidRequest("llm takes one sequence a request: send input_ids as [1, T]", param="input_ids")
        sampling = self._sampling(inputs)
        length = _length(inputs)
        positions = length + sampling.max_tokens
        if positions > self._max_positions:
            raise InvalidRequest(
                f"{length} prompt tokens + request_output_len {sampling.max_tokens} = {positions} positions, but the "
                f"model has {self._max_positions}: lower request_output_len or shorten the prompt",
                param="request_output_len",
            )
        return Sequence(request_id, self._prompt(inputs, length), sampling, _scalar(inputs, "end_id", -1))

    def _prompt(self, inputs: Mapping[str, Any], length: int) -> Prompt:
        ids = np.array(inputs["input_ids"][0, :length], np.int32)  # a copy: Triton's memory ends with execute()
        table = np.zeros((0, self._hidden_size), np.float32)
        if "prompt_embedding_table" in inputs:
            given = inputs["prompt_embedding_table"][0]
            if len(given) > self._max_positions:
                raise InvalidRequest(
                    f"prompt_embedding_table has {len(given)} rows, but the model has {self._max_positions} positions: "
                    "send only the rows that input_ids name",
                    param="prompt_embedding_table",
                )
            table = np.array(given, np.float32)
        rows = _scalar(inputs, "prompt_vocab_size", len(table))
        if rows != len(table) or table.shape[1:] != (self._hidden_size,):
            raise InvalidRequest(
                f"prompt_embedding_table is {list(table.shape)}, but prompt_vocab_size {rows} requires "
                f"[{rows}, {self._hidden_size}]",
                param="prompt_embedding_table",
            )
        if not np.isfinite(table).all():
            raise InvalidRequest(
                "prompt_embedding_table is not finite: send no NaN or infinity", param="prompt_embedding_table"
            )
        if ids.min() < 0 or ids.max() >= self._vocab_size + rows:
            raise InvalidRequest(
                f"input_ids must be 0 to {self._vocab_size + rows - 1}: {self._vocab_size} ids of the vocabulary, then "
                f"{rows} rows of prompt_embedding_table",
                param="input_ids",
            )
        if self._ends_with_text and ids[-1] >= self._vocab_size:
            raise InvalidRequest(
                f"input_ids end with {ids[-1]}, a row of prompt_embedding_table, but this LLM continues text: end with "
                f"an id below {self._vocab_size}",
                param="input_ids",
            )
        extra_ids = np.zeros(ids.size, np.uint64)
        if "prompt_table_extra_ids" in inputs:
            extra_ids = np.array(inputs["prompt_table_extra_ids"][0, :length], np.uint64)
        if extra_ids.size != ids.size:
            raise InvalidRequest(
                f"prompt_table_extra_ids has {extra_ids.size} ids for {ids.size} input tokens: send one for each",
                param="prompt_table_extra_ids",
            )
        extra_ids = naming_rows(ids, table, extra_ids, self._vocab_size)
        return Prompt(ids, table, extra_ids, clip_weights=_scalar(inputs, CLIP_WEIGHTS, False))

    @staticmethod
    def _sampling(inputs: Mapping[str, Any]) -> Sampling:
        sampling = Sampling(
            max_tokens=_scalar(inputs, "request_output_len", 0),
            temperature=_scalar(inputs, "temperature", 0.0),
            top_k=_scalar(inputs, "runtime_top_k", 0),
            top_p=_scalar(inputs, "runtime_top_p", 1.0),
            seed=_scalar(inputs, "seed", 0),
            repetition_penalty=_scalar(inputs, "repetition_penalty", 1.0),
            streaming=_scalar(inputs, "streaming", True),
            top_log_probs=_scalar(inputs, "num_top_log_probs", 0),
            guide=_guide(inputs),
        )
        for name, holds, rule in (
            ("request_output_len", sampling.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= sampling.temperature < np.inf, "0 (greedy) or more"),
            ("runtime_top_k", sampling.top_k >= 0, "0 (off) or more"),
            ("runtime_top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
            (
                "num_top_log_probs",
                0 <= sampling.top_log_probs <= MAX_TOP_LOG_PROBS,
                f"0 (none) to {MAX_TOP_LOG_PROBS}",
            ),
            (
                "repetition_penalty",
                LEAST_PENALTY <= sampling.repetition_penalty <= MOST_PENALTY,
                f"{LEAST_PENALTY:g} to {MOST_PENALTY:g}",
            ),
        ):
            if not holds:
                value = inputs[name].item() if name in inputs else "missing"
                raise InvalidRequest(f"{name} is {value}: it must be {rule}", param=name)
        return sampling


def _length(inputs: Mapping[str, Any]) -> int:
    """Return the prompt's tokens. Raises InvalidRequest."""
    given = inputs["input_ids"].shape[1]
    length: int = _scalar(inputs, "input_lengths", given)
    if not 0 < length <= given:
        raise InvalidRequest(
            f"input_lengths is {length}, but input_ids has {given} ids: send 1 to {given}", param="input_lengths"
        )
    return length


def _guide(inputs: Mapping[str, Any]) -> Guide | None:
    """Read the constraint on the answer. Raises InvalidRequest. Whoever compiles it checks the rest of its size."""
    nbytes = inputs[GUIDE].size if GUIDE in inputs else 0
    if nbytes > MAX_GUIDE_BYTES:
        raise InvalidRequest(f"{GUIDE} has {nbytes:,} bytes: shorten it to at most {MAX_GUIDE_BYTES:,}", param=GUIDE)
    try:
        kind, text = (
            bytes(inputs[name].ravel()).decode() if name in inputs else ""
            for name in ("guided_decoding_guide_type", GUIDE)
        )
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"{GUIDE} or its type is not UTF-8: encode the text as UTF-8", param=GUIDE) from exc
    match kind:
        case "" if not text:
            return None
        case "json_schema" | "regex" if text:
            return Guide(kind, text, GUIDE)
    raise InvalidRequest(
        "guided_decoding_guide_type must be json_schema or regex, and guided_decoding_guide its text: send both",
        param=GUIDE,
    )


def _scalar(inputs: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the one number of an input [1, 1] as a Python number.

    Raises InvalidRequest if the input has any other size.
    """
    if name not in inputs:
        return default
    if inputs[name].size != 1:
        raise InvalidRequest(f"{name} must be one number, not {list(inputs[name].shape)}", param=name)
    return inputs[name].item()
