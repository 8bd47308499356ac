"""Plot the learning curve: each stage's validation over its steps."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# The validation measures to show for each stage, and the title.
PANELS = {
    "language": ("Decoder on symbols", ("colour", "shape", "count", "exist", "relation", "size", "read")),
    "vision": ("Encoder, at objects' centres", ("colour", "shape", "size", "character")),
    "qformer": ("Q-Former's slots", ("slot_colour", "slot_shape", "slot_size", "slot_character")),
    "joint": ("Whole chain, answers", ("colour", "shape", "count", "exist", "relation", "size", "read")),
    "allocator": ("Answers by tokens", ("64", "112", "256", "adaptive", "random")),
    "clips": (
        "Clips by frames, groups by images",
        ("clip_4", "clip_8", "clip_16", "several_2", "several_4", "adaptive"),
    ),
}
COLOURS = {
    "colour": "#c0392b",
    "shape": "#2471a3",
    "count": "#7d3c98",
    "exist": "#7f8c8d",
    "relation": "#148f77",
    "size": "#b7950b",
    "read": "#1c2833",
    "character": "#1c2833",
    "64": "#148f77",
    "112": "#2471a3",
    "256": "#1c2833",
    "adaptive": "#c0392b",
    "random": "#7f8c8d",
    "clip_4": "#148f77",
    "clip_8": "#2471a3",
    "clip_16": "#1c2833",
    "several_2": "#b7950b",
    "several_4": "#7d3c98",
}


def plot(log: Path, target: Path) -> None:
    """Plot new scenes solid, and scenes with held-out colour-shape pairs dashed."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure, panels = pyplot.subplots(
        1, len(PANELS), figsize=(4 * len(PANELS), 4.2), sharey=True, constrained_layout=True
    )
    for panel, (stage, (title, names)) in zip(panels, PANELS.items(), strict=True):
        # A resumed stage repeats steps; the later record counts.
        rows = {record["step"]: record["valid"] for record in records if record["stage"] == stage}
        steps = sorted(rows)
        for name in names:
            label = name.removeprefix("slot_")
            for split, style in (("new", "-"), ("pairs", "--")):
                values = [rows[step].get(f"{split}_{name}", nan) for step in steps]
                panel.plot(
                    steps,
                    values,
                    style,
                    color=COLOURS[label],
                    linewidth=1.6 if split == "new" else 0.9,
                    label=label if split == "new" else None,
                )
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("steps")
        panel.set_ylim(0, 1.01)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8, frameon=False, loc="lower right")
    panels[0].set_ylabel("share right, held-out seeds\n(dashed: held-out colour-shape pairs)")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
