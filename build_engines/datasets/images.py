"""Find the images that questions name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
COCO = re.compile(r"(?:^|_)(\d{12})$")  # COCO_train2014_000000000042, and since 2017 000000000042


def images_below(folder: Path) -> list[Path]:
    """Every image file of the folder and the folders below it, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


class ImageIndex:
    """Numbers of images by path in the folder, name, name without suffix, or COCO's number of twelve digits.

    COCO's image 42 is COCO_train2014_000000000042.jpg, unless files of several names have that number. What stands
    first in the order of the paths wins. A path that does not exist stands for the file of the same name in another
    folder, if there is only one.
    """

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._by_number: dict[str, set[str]] = {}  # names without suffix
        self._by_name: dict[str, int] = {}
        self._files = Counter(path.name for path in paths)  # by name
        for place, path in reversed(list(enumerate(paths))):
            if ends := COCO.search(path.stem):
                self._by_number.setdefault(str(int(ends.group(1))), set()).add(path.stem)
            self._by_name |= {path.stem: place, path.name: place, path.relative_to(folder).as_posix(): place}

    def find(self, name: str) -> int | None:
        """The image's place among the paths; None if the folder does not have it."""
        file = name.rpartition("/")[2]
        for key in (name, name.removeprefix("./"), *([file] if self._files[file] == 1 else [])):
            if (place := self._by_name.get(key)) is not None:
                return place
        numbered = self._by_number.get(name, set())
        return self._by_name[next(iter(numbered))] if len(numbered) == 1 else None
