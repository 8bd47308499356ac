"""Read all settings of the service once at start, from GLIMPSE_ variables.

Each setting has its unit in its name.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from service.core.precision import Wanted
from service.core.variant import HOST_NAME
from service.system.environment import SecretFileError, is_service_link, with_platform, with_secrets

PREFIX = "GLIMPSE_"
OF_THE_COMMAND = (
    "GLIMPSE_URL",
    "GLIMPSE_DEBUG",
    "GLIMPSE_API_KEY",
)  # read by `glimpse` itself, so no setting of the service
HOST = re.compile(rf"{HOST_NAME}|[0-9A-Fa-f:.]*:[A-Za-z0-9._:%-]*")  # a name, or an address of IPv4 or IPv6
HOST_PATTERN = re.compile(r"(\*\.)?([a-z0-9_-]+\.)*[a-z0-9_-]+")
ORIGIN = re.compile(r"https?://[A-Za-z0-9._:\[\]-]+")
ENDPOINT = re.compile(r"https?://[A-Za-z0-9._\[\]:-]+:\d+/?")
ROUTE = re.compile(r"/[A-Za-z0-9._~:@/-]{1,500}")
MIB = 1024 * 1024
MOST_NUMBER = 1e9  # of any unit: 31 years in seconds. Timers and Redis cannot count without end
MOST_WHOLE_NUMBER = 10**15  # a petabyte
LEAST_PROXY_PREFIX = 7  # the widest private network is fc00::/7
IPV4_IN_IPV6 = IPv6Network("::ffff:0:0/96")
IMAGE_ENTRY_BYTES = 1024  # overhead of an image in the image store, besides its own bytes
PROJECT = Path(__file__).resolve().parent.parent

# Settings that are gone, and what became of them.
REMOVED = {
    "GLIMPSE_TRITON_HTTP_PORT": "the embedded Triton has no HTTP port any more. Plain KServe clients use gRPC: set "
    "GLIMPSE_TRITON_GRPC_PORT"
}


class SettingsError(ValueError):
    """The environment is not a valid configuration; the message names the variable and the reason."""


class Settings(BaseSettings):
    """Hold all settings, frozen. `GLIMPSE_HTTP_PORT=9000` sets `http_port`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", allow_inf_nan=False, validate_default=False
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take arguments only: `read_settings` has read the environment, and left out what is no setting."""
        return (init_settings,)

    # Address of the gateway. Without keys it must be this machine only, unless GLIMPSE_WITHOUT_KEYS says otherwise.
    http_host: str = "127.0.0.1"  # address or name to listen on, for HTTP and gRPC; 0.0.0.0 for all of IPv4
    http_port: int = Field(8080, ge=0, le=65535)  # 0: any free port
    grpc_port: int = Field(8081, ge=0, le=65535)  # on the same host; 0: any free port
    # More names for this service, with commas between them. If a name is set here, or GLIMPSE_HTTP_HOST is this machine
    # only, a request with another name in its Host header gets 421.
    allowed_hosts: tuple[str, ...] = ()
    # Web pages of these origins may call the service from a browser: https://app.example with commas between them, or *
    # for any. None: only the service's own page may.
    cors_origins: tuple[str, ...] = ()
    # API keys: a file that `glimpse keys` writes, or the word redis for keys in the Redis of GLIMPSE_REDIS_URL. With
    # keys every request needs one, except for health, the page, the API's description and, if it is open, /metrics.
    keys: str | None = None
    metrics_without_key: bool = False  # let anyone read /metrics without a key
    # Let a service without keys listen on other addresses than this machine's own: whoever reaches it may ask.
    without_keys: Literal["anyone-may-ask"] | None = None

    # Vertex AI's routes of a custom container. Its variables AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE set them, and
    # AIP_HTTP_PORT or PORT the port, unless the GLIMPSE_ variable is set too. None: there is no such route.
    vertex_predict_route: str | None = None  # path of Vertex AI's predictions, such as /predict
    vertex_health_route: str | None = None  # another path of /health/ready

    # After SIGTERM the service is not ready, but accepts connections for the notice and answers questions with 503, so
    # that load balancers take it out. Then its listener closes, and requests in flight have the grace to finish.
    stop_notice_s: float = Field(1.0, ge=0)  # after SIGTERM only
    stop_grace_s: float = Field(10.0, ge=0)  # requests that still run then get 503

    # Most connections, in all and from one address. Beyond them, an idle one is closed for each new one; if none is
    # idle, the new one gets 503. The limit of open files may allow fewer: the log says so.
    max_connections: int = Field(4096, gt=0, le=1_000_000)  # in all
    max_connections_per_address: int = Field(3072, gt=0, le=1_000_000)  # from one address; of IPv6 from one /64
    # Networks of the proxies and load balancers in front, such as 10.1.0.0/24, with commas between them. Each caller's
    # address is then what the proxy says in X-Forwarded-For. The limits of one address do not apply to a proxy.
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    # How many idle connections one address (of IPv6 a /64) may replace each second while all are taken; ten seconds'
    # worth may come at once. A connection beyond that gets no response and is closed after 10 s.
    replaced_connections_per_address_s: float = Field(10.0, gt=0)

    # Triton: either the gateway starts one (embedded), or these are the gRPC addresses of running ones: host:port, or
    # unix:/path of a socket. The two addresses may be equal. A name with several addresses is several Tritons.
    vision_url: str | None = None  # Triton with the vision models; set both addresses, or neither
    llm_url: str | None = None  # Triton with the LLM
    # Variants: a file that `glimpse variants` writes, or the word redis for variants in the Redis of GLIMPSE_REDIS_URL.
    # Each has its own models and Tritons. A change of weights is in use within a second.
    variants: str | None = None
    # How long the calls of one question to Tritons may take together until its first token. After that, another Triton
    # gets the current call, or another variant the question, each with a new budget. None: only failures move a
    # question. With a budget, the LLM sends tokens one by one.
    first_token_budget_ms: int | None = Field(None, gt=0, le=86_400_000)
    triton_grpc_port: int | None = Field(None, ge=1, le=65535)  # opens the embedded Triton to plain KServe clients
    triton_metrics_port: int = Field(8002, ge=1, le=65535)  # of the embedded Triton's metrics, on this machine only
    triton_start_timeout_s: float = Field(60.0, gt=0)  # for the embedded Triton; then the start has failed
    triton_exit_timeout_s: int = Field(8, gt=0)  # of `glimpse triton`: time for requests in flight, after SIGTERM
    model_repository: Path = PROJECT / "model_repository"  # folder of the served models, from `glimpse build`
    # Precision in which the embedded Triton's models compute on a CPU. auto: bf16 or int8 if the CPU is fast in it and
    # the repository's card shows that nearly all answers stay the same; else fp32. If Triton runs elsewhere: name the
    # precision that it uses.
    precision: Wanted = "auto"
    probe_interval_s: float = Field(5.0, gt=0)  # time between two real inferences that probe a model
    probe_timeout_s: float = Field(5.0, gt=0)  # for such an inference; a longer one counts as failed

    # Limits of one request.
    # Most bytes of one image, video or document; beyond it, 413. The limit is gRPC's.
    max_image_bytes: int = Field(20_000_000, gt=0, le=1_500_000_000)
    max_image_pixels: int = Field(50_000_000, gt=0)  # width times height of one image; beyond it, 413
    max_question_chars: int = Field(2_000, gt=0)  # of a question with its earlier turns; beyond it, 400
    body_timeout_s: float = Field(30.0, gt=0)  # for the whole body to arrive
    default_timeout_s: float = Field(30.0, gt=0)  # of a question without timeout_s
    max_timeout_s: float = Field(120.0, gt=0)  # the longest timeout_s that a question may have
    max_batch_questions: int = Field(1_000, gt=0)  # in one batch
    batch_timeout_s: float = Field(600.0, gt=0)  # for all questions of a batch; each has its own timeout too
    stall_timeout_s: float = Field(15.0, gt=0)  # longest time between two tokens; then the LLM counts as dead
    decode_workers: int = Field(2, gt=0, le=1024)  # processes that decode images and clips
    # CPU time to decode one image. A clip may take four times as much. Beyond it, 413.
    decode_cpu_s: float = Field(2.0, gt=0)

    # Images from URLs that callers name. Without a host here none is fetched. Hosts with commas between them: names,
    # *.example.org for all names below one, or * for every public host. TLS is verified with the system's certificate
    # authorities, or with those of SSL_CERT_FILE.
    image_url_hosts: tuple[str, ...] = ()  # hosts to fetch from
    image_url_ports: tuple[int, ...] = (443,)  # with commas between them
    image_url_http: bool = False  # http: URLs too, on the ports above
    # Networks that are not public and may be fetched from nevertheless, such as 10.1.0.0/16. Link-local addresses,
    # metadata services and translated addresses stay forbidden.
    image_url_private_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    image_url_timeout_s: float = Field(5.0, gt=0)  # for one image, with its redirects
    image_urls_at_once: int = Field(16, gt=0)  # fetches at once, in all
    image_urls_at_once_of_a_tenant: int = Field(4, gt=0)  # of a named tenant; requests without a name may use them all

    # Quota of all requests in flight, waiting or running; a request beyond it gets 429.
    # A request with more than one row's share of the LLM's tokens counts as more than one.
    max_requests_in_flight: int = Field(128, gt=0)  # most of them
    # Request bodies. A body takes up to 4 times its size while it is parsed. Bodies of more than 64 KiB leave a quarter
    # to smaller ones.
    max_bytes_in_flight: int = Field(256 * MIB, gt=0)
    max_pixels_in_flight: int = Field(1_000_000_000, gt=0)  # pixels of images that have to be decoded

    # What may run at once. None: take the value from the model repository's configurations.
    vision_slots: int | None = Field(None, gt=0)  # images in decode and encode
    llm_tokens: int | None = Field(None, gt=0)  # visual tokens, prompt tokens and max_tokens of all LLM requests

    # Default quotas of each tenant; `glimpse keys limit` sets a tenant's own. None: no limit. Redis counts them for all
    # gateways.
    quota_requests_per_minute: int | None = Field(None, gt=0)  # questions and uploads
    quota_images_per_minute: int | None = Field(None, gt=0)  # images of questions; a video counts as its frames
    quota_visual_tokens_per_minute: int | None = Field(None, gt=0)  # visual tokens that the LLM reads
    quota_generated_tokens_per_minute: int | None = Field(None, gt=0)  # tokens of answers
    quota_concurrent_requests: int | None = Field(None, gt=0)  # open requests
    # The number of gateways: without Redis, each allows the quota divided by it. None: the number that Redis last
    # showed.
    quota_gateways: int | None = Field(None, gt=0)

    # Elastic fidelity: look less closely at images if requests wait longer than the target, or if contention costs them
    # too much time.
    elastic_fidelity: bool = True  # false: the level stays at 0
    fidelity_target_s: float = Field(1.0, gt=0)  # target for the longest wait in a queue

    # Caches in the process's memory. Without keys tenants share them: a key names the image's content and not its
    # sender, so equal images are encoded once. A sender can then see from the answer's `cache` and its time whether
    # another sender sent the same bytes before.
    feature_cache_bytes: int = Field(256 * MIB, ge=0)  # vision features of images
    # int8: about a third of FP32's bytes here and in Redis. Follow-ups are then answered from rounded features.
    feature_cache_dtype: Literal["full", "int8"] = "full"
    visual_cache_bytes: int = Field(64 * MIB, ge=0)  # visual tokens of pairs of image and question
    image_store_bytes: int = Field(256 * MIB, gt=0)  # images that can be named by their ids
    image_ttl_s: float = Field(3600.0, gt=0)  # how long an image's id is valid

    # With keys, tenants share no features: equal images of two tenants are encoded twice, and none can tell by the time
    # what another has sent. True shares them.
    share_features: bool = False  # share features among tenants
    share_images: bool = True  # keep images in Redis for all gateways; else only the gateway that got one knows its id

    # Redis: gateways share vision features, images and quotas through it. Without an address each gateway has its own.
    # Addresses: redis://[[user]:password@]host:port/db, rediss:// with TLS, unix://path; redis+cluster:// or
    # rediss+cluster:// for any node of a Redis Cluster.
    redis_url: SecretStr | None = None  # address of the Redis, or of a node of a Redis Cluster
    # How long a request waits for Redis at each lookup of features and each count of a quota. Then it goes on without
    # Redis. Reading an image that is named by its id may take 1 s.
    redis_timeout_s: float = Field(0.05, gt=0)
    redis_flight_s: float = Field(2.0, gt=0)  # how long a request waits for another gateway's encode of its image
    redis_ttl_s: float = Field(86_400.0, gt=0)  # how long Redis keeps features

    # How many tenants have metrics of their own: those with the most requests. The others share the label (others).
    tenant_labels: int = Field(50, ge=0, le=1000)  # this number of tenants

    log_dir: Path = Path("logs")  # Triton's own log; "-": it goes to stderr
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # the least level that is written
    log_format: Literal["logfmt", "json"] = "logfmt"  # with json every line is JSON
    # Add the caller's address to the log lines of its requests. Behind a proxy that GLIMPSE_TRUSTED_PROXIES does not
    # list, this is the proxy's address.
    log_client_address: bool = False

    # Traces go to an OTLP receiver over gRPC, for example http://localhost:4317. The models read the first setting from
    # Triton's environment. OpenTelemetry's own OTEL_ variables give headers, certificates and resource attributes.
    otlp_endpoint: str | None = None  # None: no traces
    trace_share: float = Field(1.0, ge=0, le=1)  # of the requests whose caller sends no traceparent header
    trace_gen_ai: bool = False  # add OpenTelemetry's gen_ai attributes; they have counts and names, and no content

    @field_validator("*")
    @classmethod
    def _is_no_giant(cls, value: Any) -> Any:
        most = MOST_NUMBER if isinstance(value, float) else MOST_WHOLE_NUMBER
        if isinstance(value, int | float) and value > most:
            raise ValueError(f"must be at most {most:,.0f}")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_endpoint(cls, address: str | None) -> str | None:
        if address is not None and not ENDPOINT.fullmatch(address):
            raise ValueError(f"{address!r} is not the address of an OTLP receiver: write http://HOST:4317, or https://")
        return address

    @field_validator("vision_url", "llm_url")
    @classmethod
    def _is_address(cls, address: str | None) -> str | None:
        """gRPC takes other words too, and then never answers."""
        if address is None or address.startswith("unix:"):
            return address
        host, colon, port = address.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        wrong = "://" in address or not colon or not HOST.fullmatch(bare) or (":" in bare and bare == host)
        if wrong or not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise ValueError(
                f"{address!r} is not a gRPC address: write HOST:PORT without http://, such as triton:8001 or "
                "[::1]:8001 (Triton's gRPC port, not its HTTP port)"
            )
        return address

    @field_validator("http_host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        """An address or a name of this machine, without a port; [::1] stands for ::1."""
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if "://" in bare or not HOST.fullmatch(bare) or bare.count(":") == 1:
            raise ValueError(
                f"{host!r} is not a host: write an address of this machine without a port, such as 127.0.0.1, 0.0.0.0 "
                "or ::1; GLIMPSE_HTTP_PORT sets the port"
            )
        try:
            found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise ValueError(
                f"{host!r} is not known ({exc.strerror}): write an address of this machine, such as 127.0.0.1, 0.0.0.0 "
                "or ::1"
            ) from exc
        return bare if ":" in bare or any(family == socket.AF_INET for family, *_ in found) else str(found[0][4][0])

    @field_validator("vertex_predict_route", "vertex_health_route")
    @classmethod
    def _is_path(cls, path: str | None) -> str | None:
        if path is not None and not ROUTE.fullmatch(path):
            raise ValueError(f"{path!r} is not a path: write it from its first slash, such as /predict")
        return path

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _are_names(cls, text: str) -> tuple[str, ...]:
        return listed(text)

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _are_origins(cls, text: str) -> tuple[str, ...]:
        origins = listed(text)
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin: write https://HOST or http://HOST:PORT without a path, or *"
                )
        return origins

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: SecretStr | None) -> SecretStr | None:
        schemes = ("redis://", "rediss://", "unix://", "redis+cluster://", "rediss+cluster://")
        if url is not None and not url.get_secret_value().startswith(schemes):
            raise ValueError(
                "must start with redis://, rediss:// (TLS), redis+cluster://, rediss+cluster:// or unix://"
            )
        return url

    @field_validator("image_url_hosts", mode="before")
    @classmethod
    def _are_hosts(cls, text: str) -> tuple[str, ...]:
        hosts = listed(text.lower())
        for host in hosts:
            if host != "*" and (not HOST_PATTERN.fullmatch(host) or host.rpartition(".")[2].isdecimal()):
                raise ValueError(
                    f"{host!r} is not a host: write names with commas between them, such as "
                    "images.example.org,*.cdn.example.org, or * for every public host"
                )
        return hosts

    @field_validator("image_url_ports", mode="before")
    @classmethod
    def _are_ports(cls, text: str) -> tuple[int, ...]:
        ports = listed(text)
        for port in ports:
            if not port.isdecimal() or not 1 <= int(port) <= 65535:
                raise ValueError(f"{port!r} is not a port: write numbers with commas between them, such as 443,8443")
        return tuple(map(int, ports))

    @field_validator("image_url_private_networks", "trusted_proxies", mode="before")
    @classmethod
    def _are_networks(cls, text: str) -> tuple[IPv4Network | IPv6Network, ...]:
        return tuple(map(_network, listed(text)))

    @field_validator("trusted_proxies")
    @classmethod
    def _are_proxies(cls, networks: tuple[IPv4Network | IPv6Network, ...]) -> tuple[IPv4Network | IPv6Network, ...]:
        ipv4 = collapse_addresses(network for network in networks if isinstance(network, IPv4Network))
        ipv6 = collapse_addresses(network for network in networks if isinstance(network, IPv6Network))
        collapsed: list[IPv4Network | IPv6Network] = [*ipv4, *ipv6]
        for network in collapsed:
            if network.prefixlen < LEAST_PROXY_PREFIX:
                raise ValueError(
                    f"'{network}' is everybody or nearly so, and any of them could claim any address: name the "
                    "proxies' networks"
                )
            if isinstance(network, IPv6Network) and network.overlaps(IPV4_IN_IPV6):
                raise ValueError(
                    f"'{network}' holds IPv4 addresses in IPv6's form: write them as IPv4, as in 10.1.0.0/24"
                )
        return networks

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if not self.embedded:
            return self
        names: dict[int, str] = {}
        for name in filter(lambda name: name.endswith("_port"), type(self).model_fields):
            port = getattr(self, name)
            if not port:  # None, or any free one
                continue
            if port in names:
                raise ValueError(
                    f"{names[port]} and {PREFIX}{name.upper()} are both {port}: give one of them another port"
                )
            names[port] = PREFIX + name.upper()
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.vision_url is None) != (self.llm_url is None):
            raise ValueError("set both GLIMPSE_VISION_URL and GLIMPSE_LLM_URL (they may be equal), or neither")
        if self.variants and self.vision_url is not None:
            raise ValueError("GLIMPSE_VARIANTS and GLIMPSE_VISION_URL are both set: unset one")
        if self.variants == "redis" and self.redis_url is None:
            raise ValueError("GLIMPSE_VARIANTS is redis: set GLIMPSE_REDIS_URL to the Redis that holds the variants")
        if self.first_token_budget_ms is not None and self.embedded:
            raise ValueError(
                "GLIMPSE_FIRST_TOKEN_BUDGET_MS needs Tritons that run elsewhere: set GLIMPSE_VARIANTS, or "
                "GLIMPSE_VISION_URL and GLIMPSE_LLM_URL, or unset it"
            )
        if self.keys == "redis" and self.redis_url is None:
            raise ValueError("GLIMPSE_KEYS is redis: set GLIMPSE_REDIS_URL to the Redis that holds the keys")
        if self.keys and self.without_keys:
            raise ValueError("GLIMPSE_KEYS and GLIMPSE_WITHOUT_KEYS are both set: unset one")
        if self.default_timeout_s > self.max_timeout_s:
            raise ValueError("GLIMPSE_DEFAULT_TIMEOUT_S is over GLIMPSE_MAX_TIMEOUT_S: lower it or raise the maximum")
        if self.image_store_bytes < self.max_image_bytes + IMAGE_ENTRY_BYTES:
            raise ValueError("GLIMPSE_IMAGE_STORE_BYTES must hold at least one image of GLIMPSE_MAX_IMAGE_BYTES")
        if self.max_upload_bytes_in_flight < self.max_body_bytes:
            raise ValueError(
                f"3/4 of GLIMPSE_MAX_BYTES_IN_FLIGHT must hold at least one body, {self.max_body_bytes:,} bytes"
            )
        if self.max_pixels_in_flight < self.max_image_pixels:
            raise ValueError("GLIMPSE_MAX_PIXELS_IN_FLIGHT must hold at least one image of GLIMPSE_MAX_IMAGE_PIXELS")
        return self

    @property
    def embedded(self) -> bool:
        """Whether the gateway starts Triton itself."""
        return self.vision_url is None and not self.variants

    @property
    def first_token_budget_s(self) -> float | None:
        return None if self.first_token_budget_ms is None else self.first_token_budget_ms / 1e3

    @property
    def triton_log(self) -> Path | None:
        """The file of Triton's log; None: stderr."""
        return None if self.log_dir == Path("-") else self.log_dir / "triton.log"

    @property
    def keeps_tenants_apart(self) -> bool:
        """Whether tenants share no features."""
        return bool(self.keys) and not self.share_features

    @property
    def listens_to_others(self) -> bool:
        """Whether other machines can reach the gateway's address. Looks up a name."""
        found = socket.getaddrinfo(self.http_host, None, type=socket.SOCK_STREAM)
        return not all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)

    @property
    def max_upload_bytes_in_flight(self) -> int:
        """What bodies of more than 64 KiB may hold together, and with them everything else."""
        return self.max_bytes_in_flight * 3 // 4

    @property
    def max_body_bytes(self) -> int:
        """Size of the largest image as base64 in JSON, plus room for the other fields."""
        return self.max_image_bytes * 4 // 3 + MIB


def listed(text: str) -> tuple[str, ...]:
    """Read a list with commas between its items."""
    return tuple(filter(None, (item.strip() for item in text.split(","))))


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text)
    except ValueError as exc:
        raise ValueError(
            f"{text!r} is not a network: write networks with commas between them, such as 10.1.0.0/16,fd12::/16"
        ) from exc


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read settings from the environment.

    Raises SettingsError for a wrong value or a mistyped GLIMPSE_ variable.
    """
    environ = {
        name: value
        for name, value in with_platform(environ).items()
        if name.upper() not in OF_THE_COMMAND and not is_service_link(name, value)
    }
    try:
        environ = with_secrets(environ, secret_names())
    except SecretFileError as exc:
        raise SettingsError(str(exc)) from exc
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in sorted(environ):
        if name.upper() in REMOVED and environ[name]:
            raise SettingsError(f"{name} is no longer a setting: unset it. Note: {REMOVED[name.upper()]}")
        if name.upper().startswith(PREFIX) and name.upper() not in {*known, *REMOVED}:
            near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the known ones are {', '.join(known)}"
            raise SettingsError(f"{name} is not a setting: {hint}")
    values: dict[str, Any] = {
        name.upper().removeprefix(PREFIX).lower(): value
        for name, value in environ.items()
        if name.upper().startswith(PREFIX) and name.upper() not in REMOVED and value
    }
    try:
        return Settings(**values)
    except ValidationError as exc:
        raise SettingsError("; ".join(_in_words(error["loc"], error["msg"]) for error in exc.errors())) from exc


def secret_names() -> list[str]:
    """List the variables that hold a secret: NAME_FILE names a file with it."""
    fields = Settings.model_fields.items()
    return [PREFIX + name.upper() for name, field in fields if "SecretStr" in str(field.annotation)]


def _in_words(where: tuple[int | str, ...], message: str) -> str:
    name = PREFIX + str(where[0]).upper() if where else ""
    return f"{name}: {message}".removeprefix(": ").replace("Value error, ", "")
