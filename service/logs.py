"""Write the log, one line an event, and texts for people."""

from __future__ import annotations

import logging
from typing import TextIO, cast

import orjson
import structlog

from service.settings import Settings
from service.system.output import Output, Stream

log = structlog.get_logger()


def stream_to(output: Output, stream: TextIO | None) -> Stream:
    """Write to the same file as one of Python's streams, which is None if the process was started without it."""
    return Stream(output, stream.fileno() if stream else None)


def tell(settings: Settings, out: Stream, event: str, text: str, **fields: object) -> None:
    """Write a text for people; in a log of JSON, where every line is JSON, an event for programs."""
    if settings.log_format == "json":
        log.warning(event, **fields) if "error" in fields else log.info(event, **fields)
    else:
        out.write(text)


def configure_log(settings: Settings, stream: Stream) -> None:
    """Log one line an event: the service's events and the libraries' warnings."""
    level = getattr(logging, settings.log_level.upper())
    renderer: structlog.typing.Processor
    if settings.log_format == "json":
        renderer = structlog.processors.JSONRenderer(lambda event, **_: orjson.dumps(event, default=str).decode())
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, stream)),
        cache_logger_on_first_use=True,
    )
    lines = logging.StreamHandler(cast(TextIO, stream))  # of libraries
    lines.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso"),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[lines], force=True)
    logging.captureWarnings(True)
