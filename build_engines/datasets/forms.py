"""Read the files of VQAv2, GQA, TextVQA, DocVQA, COCO captions, and JSON lines.

| form | what its file has |
|---|---|
| vqav2 | `questions` (`image_id`, `question`, `question_id`); beside it `*annotations.json` with the answers |
| gqa | an object by question id: `imageId`, `question`, `answer`, `types` |
| textvqa | `data`: `image_id`, `question`, `answers` |
| docvqa | `data`: `image`, `question`, `answers`, `question_types` |
| coco-captions | `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`) |
| jsonl | one object a line: `image`, `question`, `answer` or `answers`, optional `type` |

A record that cannot be used is listed with the reason, and left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from build_engines.datasets.entries import Dataset, Entry, NotReadable

MOST_JSON_FILES = 20  # of a folder below the dataset's: more of them are not question files but one for each image
FIRST = 10  # records of a file, which tell its form
FORMS = ("vqav2", "gqa", "textvqa", "docvqa", "coco-captions", "jsonl")

Skipped = dict[str, str]


def read(path: Path, form: str = "auto") -> Dataset:
    """Read a file of questions, or the only one in a folder. form: one of FORMS, or `auto` to tell it by its content.

    Raises NotReadable if there is no such file, several, or one of another form.
    """
    if path.is_file():
        return _read(path, form)
    if not path.is_dir():
        raise NotReadable(f"{path} does not exist: give a folder with questions and images, or a file of questions")
    found: list[tuple[Path, Any]] = []
    faults: Skipped = {}
    for file in question_files(path):
        if file.suffix == ".jsonl":
            if form in ("auto", "jsonl"):
                found.append((file, None))
        elif form != "jsonl":
            content = content_of(file, faults)
            kind = form_of(content)
            if kind and form in ("auto", kind):
                found.append((file, content))
    if not found:
        faulty = "".join(f". {name}: {fault}" for name, fault in list(faults.items())[:3])
        sought = "questions in a known form" if form == "auto" else f"questions of the form {form}"
        raise NotReadable(f"{path} has no {sought} ({', '.join(FORMS)}){faulty}")
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(path)) for file, _ in found[:6])
        raise NotReadable(f"{path} has several files of questions ({names}): name one of them instead of the folder")
    return _read(found[0][0], form, found[0][1], folder=path)


def question_files(folder: Path) -> list[Path]:
    """The JSON files of a folder; if it has none, those of its folders."""
    if here := _json_files(folder):
        return here
    below = [_json_files(each) for each in sorted(folder.iterdir()) if each.is_dir() and not _is_run(each)]
    return [file for files in below if len(files) <= MOST_JSON_FILES for file in files]


def _is_run(folder: Path) -> bool:
    """Whether `glimpse eval` has written its answers and report there, or `glimpse adapt` its allocator."""
    runs = (("run.json", "answers.jsonl"), ("adapted.json", "report.json"))
    return any(all((folder / name).is_file() for name in names) for names in runs)


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jsonl") and path.is_file())


def form_of(content: Any) -> str:
    """The form of a JSON file's content; an empty text for something else, such as annotations, objects or OCR."""
    if not isinstance(content, dict):
        return ""
    if _has(content.get("questions"), "question"):
        return "vqav2"
    if _has(data := content.get("data"), "question"):
        return "docvqa" if _has(data, "image") else "textvqa"
    if _has(content.get("images"), "file_name") and _has(content.get("annotations"), "caption"):
        return "coco-captions"
    return (
        "gqa"
        if any(isinstance(each, dict) and {"imageId", "question"} <= each.keys() for each in content.values())
        else ""
    )


def _has(records: Any, name: str) -> bool:
    """Whether it is a list whose first objects have this key."""
    return isinstance(records, list) and any(isinstance(each, dict) and name in each for each in records[:FIRST])


def entries_of(content: Any, file: Path, folder: Path, skipped: Skipped) -> list[Entry]:
    """The entries of a JSON file's content, whatever its form is; none for something else."""
    readers: Mapping[str, Callable[[], Iterable[Entry]]] = {
        "vqav2": lambda: _vqav2(content, annotations_of(file, folder, skipped), file.name, skipped),
        "gqa": lambda: _each(content.items(), _gqa, file.name, skipped),
        "textvqa": lambda: _each(enumerate(content["data"]), _textvqa, file.name, skipped),
        "docvqa": lambda: _each(enumerate(content["data"]), _docvqa, file.name, skipped),
        "coco-captions": lambda: _coco(content, file.name, skipped),
    }
    reader = readers.get(form_of(content))
    return list(reader()) if reader else []


def jsonl_entries(file: Path, skipped: Skipped) -> Iterator[Entry]:
    """Raises NotReadable if the file cannot be read."""
    return (entry for entry, _ in jsonl_lines(file, skipped))


def jsonl_lines(file: Path, skipped: Skipped) -> Iterator[tuple[Entry, Mapping[str, Any]]]:
    """Each line's question, whose id is the line's number, and the object that it was read from.

    Raises NotReadable if the file cannot be read.
    """
    for number, line in lines_of(file):
        try:
            told = json.loads(line)
            answers = told["answers"] if told.get("answers") is not None else told.get("answer")
            kinds = {"type": (str(told["type"]),)} if told.get("type") else {}
            entry = Entry(_text(told["image"]), _text(told["question"]), _texts(answers), str(number), kinds)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            skipped[f"{file.name}:{number}"] = f"needs a JSON object with image and question: {exc!r}"
        else:
            yield entry, told


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """The file's lines that are not empty, with their numbers. Only a line feed ends a line.

    Raises NotReadable if the file cannot be read.
    """
    return ((number, line) for number, line in enumerate(_read_text(file).split("\n"), 1) if line.strip())


def annotations_of(file: Path, folder: Path, skipped: Skipped) -> dict[Any, Mapping[str, Any]]:
    """VQAv2's annotations by question id, from the file that belongs to the questions, else from every one there is."""
    own = file.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("questions", "annotations")
    files = [path for path in (file.with_name(own), folder / own) if path != file and path.is_file()][:1]
    files = files or sorted({*file.parent.glob("*annotations.json"), *folder.rglob("*annotations.json")})
    found: dict[Any, Mapping[str, Any]] = {}
    for path in files:
        content = content_of(path, skipped)
        told = content.get("annotations") if isinstance(content, dict) else None
        for each in told if isinstance(told, list) else []:
            if isinstance(each, dict) and isinstance(each.get("question_id"), int | str):
                found[each["question_id"]] = each
    return found


def _read(file: Path, form: str, content: Any = None, folder: Path | None = None) -> Dataset:
    skipped: Skipped = {}
    if file.suffix == ".jsonl" or form == "jsonl":
        found, entries = "jsonl", list(jsonl_entries(file, skipped))
    else:
        if content is None:
            content = content_of(file, skipped)
        found = form_of(content)
        if not found or form not in ("auto", found):
            reason = skipped.get(file.name) or f"its content is {found or 'of no known form'}"
            raise NotReadable(f"{file} is not a file of questions of the format {form}: {reason}")
        entries = entries_of(content, file, folder or file.parent, skipped)
    if not entries:
        few = "".join(f". {place}: {reason}" for place, reason in list(skipped.items())[:3])
        raise NotReadable(f"{file} has no question that can be used{few}")
    return Dataset(found, file, entries, skipped)


def content_of(file: Path, skipped: Skipped) -> Any:
    """A JSON file's content; None if it is no JSON. Raises NotReadable if the file cannot be read."""
    try:
        return json.loads(_read_text(file))
    except (ValueError, RecursionError) as exc:
        skipped[file.name] = f"no JSON: {exc}"
        return None


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig", errors="replace")
    except OSError as exc:
        raise NotReadable(f"cannot read {file}: {exc.strerror}") from exc


def _each(
    records: Iterable[tuple[Any, Any]], entry: Callable[[Any, Any], Entry], name: str, skipped: Skipped
) -> Iterator[Entry]:
    for place, record in records:
        try:
            yield entry(place, record)
        except (KeyError, TypeError, AttributeError) as exc:
            skipped[f"{name}:{place}"] = f"no question of this form: {exc!r}"


def _vqav2(
    content: Mapping[str, Any], annotations: Mapping[Any, Mapping[str, Any]], name: str, skipped: Skipped
) -> Iterator[Entry]:
    def entry(_: Any, told: Any) -> Entry:
        known = annotations.get(told.get("question_id"), {})
        answers = _texts([each["answer"] for each in known.get("answers", [])])
        agreed = str(known.get("multiple_choice_answer", ""))
        kinds = {
            kind.replace("_", " "): (str(known[kind]),) for kind in ("answer_type", "question_type") if kind in known
        }
        answers = answers or _texts(agreed)
        return Entry(
            str(told["image_id"]), str(told["question"]), answers, str(told.get("question_id", "")), kinds, agreed
        )

    return _each(enumerate(content["questions"]), entry, name, skipped)


def _gqa(place: Any, told: Any) -> Entry:
    types = told.get("types") or {}
    kinds = {f"{kind} type": (str(types[kind]),) for kind in ("structural", "semantic") if types.get(kind)}
    return Entry(str(told["imageId"]), str(told["question"]), _texts(told.get("answer")), str(place), kinds)


def _textvqa(place: Any, told: Any) -> Entry:
    asked = str(told.get("question_id", place))
    return Entry(str(told["image_id"]), str(told["question"]), _texts(told.get("answers")), asked)


def _docvqa(place: Any, told: Any) -> Entry:
    types = told.get("question_types") or []
    kinds = {"question type": tuple(map(str, types))} if types else {}
    asked = str(told.get("questionId", place))
    return Entry(str(told["image"]), str(told["question"]), _texts(told.get("answers")), asked, kinds)


def _coco(content: Mapping[str, Any], name: str, skipped: Skipped) -> Iterator[Entry]:
    """An entry for each image, with all its captions."""
    captions: dict[Any, list[str]] = {}
    for place, told in enumerate(content["annotations"]):
        try:
            captions.setdefault(told["image_id"], []).append(str(told["caption"]))
        except (KeyError, TypeError) as exc:
            skipped[f"{name}:annotations:{place}"] = f"no caption of an image: {exc!r}"

    def entry(_: Any, told: Any) -> Entry:
        return Entry(str(told["file_name"]), "", tuple(captions.get(told["id"], ())), str(told["id"]))

    return _each(enumerate(content["images"]), entry, f"{name}:images", skipped)


def _texts(told: Any) -> tuple[str, ...]:
    """One answer or a list of them; none for nothing."""
    if told is None or told == "":
        return ()
    return tuple(_text(one) for one in told) if isinstance(told, list) else (_text(told),)


def _text(told: Any) -> str:
    """A text, or a number as a text. Raises TypeError for anything else."""
    if not isinstance(told, str | int | float):
        raise TypeError(f"{told!r} is no text")
    return str(told)
