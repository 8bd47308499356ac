#!/usr/bin/env python3
"""Print what a Dockerfile's pip installs: `python3 scripts/requirements.py EXTRA... [group:NAME]...`, a line each.

The versions that are pinned by hand stand in pyproject.toml only. Needs Python 3.11 and nothing installed.
"""

import os
import re
import sys

from environment import pins, pyproject

OWN = re.compile(r"glimpse\[([\w,]+)\]")


def requirements(name, extras):
    """One extra's requirements and those of the extras that it includes."""
    found = []
    for requirement in extras[name]:
        own = OWN.fullmatch(requirement)
        if own is None:
            found.append(requirement)
        else:
            found += [each for inner in own[1].split(",") for each in requirements(inner, extras)]
    return found


def main():
    project = pyproject()["project"]
    known = project["optional-dependencies"]
    printed = []
    for name in sys.argv[1:]:
        if name.startswith("group:"):
            printed += pins(name.removeprefix("group:"))
        elif name in known:
            printed += [*project["dependencies"], *requirements(name, known)]
        else:
            sys.exit(f"{os.path.basename(__file__)}: pyproject.toml has no extra {name}: it has {', '.join(known)}")
    if not printed:
        sys.exit(__doc__)
    print("\n".join(dict.fromkeys(printed)))


if __name__ == "__main__":
    main()
