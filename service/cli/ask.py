"""Ask a running service about an image: `glimpse ask`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.client import AskFailed, answer, connected, plain_words, read_image, stream, upload
from service.cli.options import Detail, Url, budget, url_of
from service.cli.terminal import require

IMAGE_ID = re.compile(r"img_[0-9a-f]{32}")


def ask(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="A file, - for standard input, or the id img_... of one sent before.")
    ],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="One or more questions about it.")],
    url: Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token each time.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw only from this number of most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw only from the most likely tokens whose probabilities reach this sum.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    vision_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="Vision tokens that the Q-Former reads.")
    ] = None,
    visual_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="Visual tokens that the LLM reads: 32 to 128.")
    ] = None,
    detail: Annotated[
        Detail | None, typer.Option(help="high adds a closer view of the image; auto adds it if the question needs it.")
    ] = None,
    explain: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw where the model looked, and why; one question only.")
    ] = None,
    confidence: Annotated[bool, typer.Option("--confidence", help="Print how sure each answer is behind it.")] = False,
    min_confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="Mark answers that are less sure; implies --confidence.")
    ] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
) -> None:
    """Ask a running service about an image, and print the answer as it comes.

    With several questions the image is sent once, and its features are computed once.

    \b
      glimpse ask photo.jpg "what colour is the small circle?"
      glimpse ask photo.jpg "how many circles are there?" "is there a red square?"
      glimpse ask photo.jpg "what does the label say?" --detail high
      glimpse ask photo.jpg "what does the label say?" --min-confidence 0.8
      glimpse ask photo.jpg "is there a red square?" --explain looked.png
      glimpse ask photo.jpg "is there a red square?" --explain looked.png --json | jq .relevance     # the numbers drawn
    """
    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "budget": budget(vision_tokens, visual_tokens),
        "detail": detail,
        "explain": True if explain else None,
        "min_confidence": min_confidence,
        "timeout_s": timeout_s,
    }
    asked = {name: value for name, value in fields.items() if value is not None}
    address = url_of(url)
    with plain_words(address), connected(address) as client:
        require_sendable(asked, questions)
        if explain:
            require_drawable(explain, image, questions)
        data = None if is_id(image) else read_image(image)
        image_id = image if data is None else upload(client, data)
        for question in questions:
            body = asked | {"image": image_id, "question": question}
            if as_json or explain:
                said = answer(client, body)
                typer.echo(json.dumps(said) if as_json else said["answer"])
                if explain and data is not None:
                    draw(data, question, said, explain)
                continue
            if len(questions) > 1:
                typer.echo(f"{question} ", nl=False)
            if confidence or min_confidence is not None:
                said = answer(client, body)
                typer.echo(f"{said['answer']} {sureness(said)}")
                continue
            for text in stream(client, body):
                typer.echo(text, nl=False)
            typer.echo()


def sureness(said: dict[str, Any]) -> str:
    """Write how sure an answer is, such as `(confidence 0.31, found 0.02: abstained, not_found)`. Raises AskFailed."""
    if "confidence" not in said:
        raise AskFailed(f"{said['model']} does not tell how sure it is: leave --confidence out")
    told = ", ".join(f"{name} {said[name]:.2f}" for name in ("confidence", "found") if name in said)
    return f"({told}: abstained, {said['reason']})" if said.get("abstained") else f"({told})"


def is_id(image: str) -> bool:
    """Whether it names an image that the service has: a file of that name comes first."""
    return IMAGE_ID.fullmatch(image) is not None and not Path(image).exists()


def require_sendable(fields: dict[str, Any], questions: list[str]) -> None:
    """Check what JSON cannot carry. Raises AskFailed."""
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise AskFailed(f"--{name.replace('_', '-')} is {value}: give a finite number")
    for name, texts in (("the question", questions), ("--stop", fields.get("stop", []))):
        for text in texts:
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # Python's words for bytes that it cannot read
                raise AskFailed(f"{name} is not UTF-8 text: {text!a}")


def require_drawable(target: Path, image: str, questions: list[str]) -> None:
    """Check before any request whether a picture can be drawn. Raises AskFailed."""
    require("matplotlib", "serve")
    if target.suffix.lower() != ".png":
        raise AskFailed(f"{target} is not a .png file: write --explain {target.with_suffix('.png')}")
    if len(questions) > 1:
        raise AskFailed(f"--explain draws one question, not {len(questions)}: ask each one separately")
    if is_id(image):
        raise AskFailed("--explain draws over the image: name its file, not its id")


def draw(image: bytes, question: str, said: dict[str, Any], target: Path) -> None:
    """Draw where the model looked into a file. Raises AskFailed."""
    from service.cli import drawing  # noqa: PLC0415  (takes 0.3 s, so only this command imports it)

    try:
        target.write_bytes(drawing.png(drawing.explain(image, question, said)))
    except OSError as exc:
        raise AskFailed(f"cannot write {target}: {exc.strerror}") from exc
