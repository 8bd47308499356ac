"""Builds that share their exported graphs: PyTorch's exporter takes 6 s of CPU time a graph, everything else little.

Each graph is exported once in a run of the tests, by the first test that needs it. Graphs are the same if their
modules, weights, inputs and settings are, whichever checkpoint they are of: an adapted checkpoint has the encoder of
the plain one. A build finds the graphs in its work folder as finished steps of a build before. It checks the key and
the digest of every file, as ever. A whole build takes 5 s more: `built` does it once for every file that only reads it.

A test that is about the exporting itself calls `build.main`, `export` or `export_graph`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from build_engines.convert import __main__ as build
from build_engines.convert.inspection import inspect
from build_engines.convert.options import Options
from build_engines.convert.plan import Step, plan
from build_engines.convert.run import declare_done
from build_engines.convert.steps import MODEL, Maker
from build_engines.export import Graph, export_graph
from tests.support.graph_digest import digest_of
from tests.support.once import Once


class SharedExports:
    """Exported graphs by what they were exported from."""

    def __init__(self, once: Once) -> None:
        self._once = once

    def path(self, graph: Graph) -> Path:
        """Return the exported graph, which nobody changes."""
        folder = self._once.made(f"graph-{digest_of(graph)}", lambda folder: export_graph(graph, folder / MODEL))
        return folder / MODEL

    def write(self, graph: Graph, path: Path) -> None:
        """Write what `export_graph` would."""
        shutil.copyfile(self.path(graph), path)

    def build(self, *arguments: str) -> int:
        """Run `glimpse build` -> its exit status."""
        self.lend(*arguments)
        return build.main(list(arguments))

    def built(self, name: str, save: Callable[[Path], None], profile: str = "embedded") -> Path:
        """Return a folder with a checkpoint of this name and `repository`, its build, once in a run of the tests."""

        def make(folder: Path) -> None:
            save(folder / name)
            arguments = ["--profile", profile, "--out", str(folder / "repository")]
            assert self.build(str(folder / name), *arguments) == 0

        return self._once.made(f"built-{name}-{profile}", make)

    def lend(self, *arguments: str, but: Collection[str] = ()) -> None:
        """Put the exported graphs into the work folder of a build with these arguments, but those of some graphs."""
        options = build.options_of(build.parser().parse_args(arguments))
        for step, graph in graphs_of(options):
            folder = options.work / step.folder
            if graph.name not in but and not folder.exists():
                folder.mkdir(parents=True)
                self.write(graph, folder / MODEL)
                declare_done(step, folder)


def graphs_of(options: Options) -> list[tuple[Step, Graph]]:
    """List a build's export steps, each with its graph."""
    source = inspect(options.checkpoint, options.allocator, options.zero_shot, options.image_text)
    root = build.root_of(source)
    steps = plan(options, source, root)
    maker = Maker(options, source, root, steps)
    return [
        (step, maker.graphs(step.settings["static"])[step.settings["graph"]])
        for step in steps
        if step.action == "export"
    ]
