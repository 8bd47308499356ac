"""Measure the accuracy of a running service: `glimpse eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from service.cli.client import AskFailed, connected, plain_words
from service.cli.measuring import Sample, measure
from service.cli.options import Detail, Fit, Url, budget, url_of, utf8
from service.cli.terminal import require
from service.core.frames import MAX_FRAMES

Format = Literal["auto", "vqav2", "gqa", "textvqa", "docvqa", "coco-captions", "jsonl"]


def evaluate(
    url: Url = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Your own dataset: a folder with questions and images, or its file of questions."),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="The format of --dataset; auto detects it from the content.")
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only this many questions of --dataset, drawn by --seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which questions --limit draws.")] = 0,
    prompt: Annotated[
        str | None,
        typer.Option(
            help='What is asked, such as "{question} Answer in one word."  [default: the question as it is; for '
            'captions "describe the image."]',
            show_default=False,
            callback=utf8,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer to --dataset [default: 16; for captions 40].")
    ] = None,
    scenes: Annotated[
        Path | None, typer.Option(help="Folder with questions.jsonl [default: the committed ones].")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Only this split of the scenes. `clips` and `several` (several images) are excluded by default: "
            "name one to ask it."
        ),
    ] = None,
    frames: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=MAX_FRAMES,
            help="Look at so many frames of each clip; may be given again [default: 4, 8, 16 and 32 in turn].",
            show_default=False,
        ),
    ] = None,
    vision_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="Every question's budget of vision tokens.")
    ] = None,
    visual_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="Every question's budget of visual tokens.")
    ] = None,
    detail: Annotated[Detail | None, typer.Option(help="The detail of every question.")] = None,
    fit: Fit = None,
    clients: Annotated[
        int, typer.Option(min=1, max=64, help="Questions asked at the same time; fewer if the service has no room.")
    ] = 4,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the scenes' table as JSON here too. With --dataset: the folder of answers and report "
            "[default: NAME-eval]. The same command goes on where it was stopped."
        ),
    ] = None,
) -> None:
    """Measure the accuracy of a running service.

    The table is by question type, with 95 % intervals. Without --dataset it asks about the committed held-out scenes.
    With it, it asks the questions of a public dataset's files, or your own, and writes report.html, report.json and
    answers.jsonl.

    \b
      glimpse eval
      glimpse eval --vision-tokens 64 112      # how well it answers if it looks less closely
      glimpse eval --detail auto               # or if it may look closer
      glimpse eval --split clips --frames 8    # questions about short videos
      glimpse eval --dataset vqav2/ --limit 2000 --prompt "Question: {question} Short answer:"
      glimpse eval --dataset mine/questions.jsonl --out report/    # {"image": ..., "question": ..., "answer": ...}

    \b
    --format        files                                                    metric
    vqav2           v2_OpenEnded_*questions.json, v2_*annotations.json       consensus accuracy
    gqa             testdev_balanced_questions.json                          exact match
    textvqa         TextVQA_0.5.1_val.json                                   consensus accuracy
    docvqa          val_v1.0.json                                            ANLS
    coco-captions   captions_val2014.json                                    CIDEr-D, BLEU-1 to 4, ROUGE-L
    jsonl           image, question, answer or answers, type (optional)      exact match
    """
    require("build_engines", "serve")
    require("numpy", "serve")
    options = {"budget": budget(vision_tokens, visual_tokens), "detail": detail, "fit": fit}
    address = url_of(url)
    with plain_words(address), connected(address) as client:
        if dataset is not None:
            if scenes or split or frames:
                raise AskFailed(
                    "--scenes, --split and --frames belong to the committed scenes: leave them out, or --dataset"
                )
            sample = Sample(dataset, form, limit, seed, prompt)
            asked = {name: value for name, value in {**options, "max_tokens": max_tokens}.items() if value is not None}
            measure(client, sample, asked, out, clients)
            return
        if form != "auto" or limit or prompt or max_tokens:
            raise AskFailed("--format, --limit, --prompt and --max-tokens belong to --dataset: name one")
        from build_engines.evaluation import accuracy  # noqa: PLC0415

        folder = scenes or accuracy.folder_of(split)
        if frames and not any(row.clip for row in accuracy.rows(folder, split)):
            raise AskFailed("--frames belongs to clips: add --split clips, or leave it out")
        accuracy.evaluate(
            client,
            folder,
            split=split,
            budget=budget(vision_tokens, visual_tokens),
            detail=detail,
            fit=fit,
            clients=clients,
            out=out,
            frames=tuple(frames or accuracy.FRAMES),
        )
