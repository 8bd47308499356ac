"""Every knob of the service, each with its unit in its name, read once at start from GLIMPSE_ variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "GLIMPSE_"
MIB = 1024 * 1024
IMAGE_ENTRY_BYTES = 1024  # what an image that is kept by its id takes besides its own bytes
PROJECT = Path(__file__).resolve().parent.parent


class SettingsError(ValueError):
    """The environment does not make a valid configuration; the message says which variable and why."""


class Settings(BaseSettings):
    """One frozen value. `GLIMPSE_HTTP_PORT=9000` sets `http_port`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    # Where the gateway listens. Nothing is authenticated yet, so the default is this machine only.
    http_host: str = "127.0.0.1"
    http_port: int = Field(8080, ge=0, le=65535)  # 0: any free port
    stop_grace_s: float = Field(10.0, ge=0)  # what requests in flight get to finish after SIGTERM

    # Triton: the one we start (embedded), or two addresses of running ones, host:port of gRPC, which may be equal.
    vision_url: str | None = None
    llm_url: str | None = None
    triton_http_port: int = Field(8000, ge=1, le=65535)
    triton_grpc_port: int = Field(8001, ge=1, le=65535)
    triton_metrics_port: int = Field(8002, ge=1, le=65535)
    triton_start_timeout_s: float = Field(60.0, gt=0)
    model_repository: Path = PROJECT / "model_repository"
    probe_interval_s: float = Field(5.0, gt=0)  # how often every model is really inferred
    probe_timeout_s: float = Field(5.0, gt=0)

    # What a request may bring and ask for.
    max_image_bytes: int = Field(20_000_000, gt=0)
    max_image_pixels: int = Field(50_000_000, gt=0)
    max_question_chars: int = Field(2_000, gt=0)
    body_timeout_s: float = Field(30.0, gt=0)  # for the whole body to arrive
    default_timeout_s: float = Field(30.0, gt=0)
    max_timeout_s: float = Field(120.0, gt=0)
    stall_timeout_s: float = Field(15.0, gt=0)  # between two tokens, before the LLM counts as dead
    decode_threads: int = Field(2, gt=0)

    # What may be in the house at once, waiting or running; what comes on top is refused with 429.
    max_requests_in_flight: int = Field(
        128, gt=0
    )  # one with more than a row's share of the LLM's tokens counts as more
    max_bytes_in_flight: int = Field(256 * MIB, gt=0)  # of bodies; one takes up to 4 times its size while it is parsed
    max_pixels_in_flight: int = Field(1_000_000_000, gt=0)  # of images that have to be decoded

    # Of that, what runs at once. None: what the model repository's configurations say.
    vision_slots: int | None = Field(None, gt=0)  # images in decode and encode
    llm_tokens: int | None = Field(None, gt=0)  # visual, prompt and max_tokens of all that the LLM answers

    # Elastic fidelity: while requests wait longer than the target, or lose too much of their time to those that are
    # worked on beside them, they look less closely.
    elastic_fidelity: bool = True
    fidelity_target_s: float = Field(1.0, gt=0)  # of the longest wait for a turn

    # What is kept in the process's memory. Tenants share the caches: a key names the image's content, not who sent it,
    # so that equal images are encoded once. Who sends an image can tell by the answer's `cache` and its time whether
    # anybody sent the same bytes before. Where tenants must not know that of each other, give each a gateway (and a
    # Redis) of its own.
    feature_cache_bytes: int = Field(256 * MIB, ge=0)
    # int8: a quarter of FP32's bytes here and in Redis; a follow-up is then answered from rounded features.
    feature_cache_dtype: Literal["full", "int8"] = "full"
    visual_cache_bytes: int = Field(64 * MIB, ge=0)  # what images gave for questions
    image_store_bytes: int = Field(256 * MIB, gt=0)
    image_ttl_s: float = Field(3600.0, gt=0)  # how long an image can be asked about by its id

    # Redis, where gateways share vision features; without an address each keeps its own only.
    # redis://[[user]:password@]host:port/db, rediss:// with TLS, unix://path; redis+cluster:// or rediss+cluster:// for
    # any node of a Redis Cluster
    redis_url: SecretStr | None = None
    redis_timeout_s: float = Field(0.05, gt=0)  # what Redis may cost one request, whatever it does
    redis_flight_s: float = Field(2.0, gt=0)  # how long a gateway waits for another one's encode of the same image
    redis_ttl_s: float = Field(86_400.0, gt=0)  # how long features are kept there

    log_dir: Path = Path("logs")  # Triton's own log
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["logfmt", "json"] = "logfmt"

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: SecretStr | None) -> SecretStr | None:
        schemes = ("redis://", "rediss://", "unix://", "redis+cluster://", "rediss+cluster://")
        if url is not None and not url.get_secret_value().startswith(schemes):
            raise ValueError(
                "must start with redis://, rediss:// (TLS), redis+cluster://, rediss+cluster:// or unix://"
            )
        return url

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.vision_url is None) != (self.llm_url is None):
            raise ValueError("set both GLIMPSE_VISION_URL and GLIMPSE_LLM_URL (they may be equal), or neither")
        if self.default_timeout_s > self.max_timeout_s:
            raise ValueError("GLIMPSE_DEFAULT_TIMEOUT_S is over GLIMPSE_MAX_TIMEOUT_S")
        if self.image_store_bytes < self.max_image_bytes + IMAGE_ENTRY_BYTES:
            raise ValueError("GLIMPSE_IMAGE_STORE_BYTES must hold at least one image of GLIMPSE_MAX_IMAGE_BYTES")
        if self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError(f"GLIMPSE_MAX_BYTES_IN_FLIGHT must hold at least one body, {self.max_body_bytes:,} bytes")
        if self.max_pixels_in_flight < self.max_image_pixels:
            raise ValueError("GLIMPSE_MAX_PIXELS_IN_FLIGHT must hold at least one image of GLIMPSE_MAX_IMAGE_PIXELS")
        return self

    @property
    def embedded(self) -> bool:
        """Whether we start Triton ourselves."""
        return self.vision_url is None

    @property
    def max_body_bytes(self) -> int:
        """The largest image as base64 in JSON, and room for the other fields."""
        return self.max_image_bytes * 4 // 3 + MIB


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the environment. Raises SettingsError for a wrong value or a mistyped GLIMPSE_ variable."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the known ones are {', '.join(known)}"
            raise SettingsError(f"{name} is not a setting: {hint}")
    values: dict[str, Any] = {
        name.upper().removeprefix(PREFIX).lower(): value
        for name, value in environ.items()
        if name.upper().startswith(PREFIX) and value
    }
    try:
        return Settings(**values)
    except ValidationError as exc:
        raise SettingsError("; ".join(_in_words(error["loc"], error["msg"]) for error in exc.errors())) from exc


def _in_words(where: tuple[int | str, ...], message: str) -> str:
    name = PREFIX + str(where[0]).upper() if where else ""
    return f"{name}: {message}".removeprefix(": ").replace("Value error, ", "")
