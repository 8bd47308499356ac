"""A repository that is written where an earlier one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_engines.export import export
from build_engines.replacing import replacing, why_not
from build_engines.repository import GRAPHS, Dimensions, write_repository


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in (*(f"{graph}.onnx" for graph in GRAPHS), "card.json"):
        (folder / name).write_text("new")
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One of an earlier checkpoint, with integers for CPUs, that `glimpse build` wrote."""
    folder = tmp_path / "repository"
    for name in ("llm/1/model.onnx", "llm/1/model.int4.onnx", "qformer/1/model.int8.onnx", "card.json",
                 "manifest.json", "llm/1/clips.onnx"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    return folder


def test_nothing_of_an_earlier_repository_stays(exported: Path, repository: Path) -> None:
    write_repository(repository, Dimensions(1, 1), exported, {"card.json": exported / "card.json"})
    graphs = {f"{graph}/1/model.onnx" for graph in GRAPHS}
    there = {str(path.relative_to(repository)) for path in repository.rglob("*.*") if path.suffix in (".onnx", ".json")}
    assert there == graphs | {"card.json"}
    assert {(repository / name).read_text() for name in there} == {"new"}
    assert sorted(path.name for path in repository.parent.iterdir()) == ["exported", "repository"]


def test_a_link_to_a_repository_stays_a_link(exported: Path, repository: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(repository)
    write_repository(link, Dimensions(1, 1), exported, {"card.json": exported / "card.json"})
    assert link.is_symlink()
    assert (repository / "card.json").read_text() == "new"
    assert not (repository / "manifest.json").exists()


def test_a_repository_that_could_not_be_written_to_its_end_leaves_the_earlier_one(
    exported: Path, repository: Path
) -> None:
    before = {path: path.read_text() for path in repository.rglob("*") if path.is_file()}
    with pytest.raises(FileNotFoundError, match="nowhere"):  # the last file that is written
        write_repository(repository, Dimensions(1, 1), exported, {"nowhere/card.json": exported / "card.json"})
    assert {path: path.read_text() for path in repository.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_repository_is_not_replaced_by_an_export(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a model repository and is not empty"):
        export(tmp_path / "checkpoint", tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_cannot_be_renamed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "engines"
    assert why_not(out) == ""
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    assert "is where a volume is mounted" in why_not(out)
    monkeypatch.undo()
    monkeypatch.setattr("build_engines.replacing.os.access", lambda path, _: path != tmp_path)
    assert why_not(out / "a" / "b").startswith(f"{tmp_path} cannot be written")


def test_a_replacement_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "engines"
    out.mkdir()
    (out / "card.json").write_text("old")

    def write() -> None:
        with replacing(out) as fresh:
            (fresh / "llm").mkdir(parents=True)
            (fresh / "nowhere" / "card.json").write_text("new")

    with pytest.raises(FileNotFoundError):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]
    assert (out / "card.json").read_text() == "old"
