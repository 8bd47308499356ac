#!/usr/bin/env python3
"""Run mutmut group by group: some modules, and the tests that know them. Then list what no test noticed.

    python scripts/mutants.py                                 # every group
    python scripts/mutants.py "triton_models.kv_pool*"        # the mutants of these names

Before its first mutant, mutmut runs every selected test once and records which functions it calls: that takes several
times as long as the tests alone. A small group begins with its mutants after a minute or two.

Each group has a folder in mutants/, with links to the sources and mutmut's own copy of them. A second run goes on where
the first one ended. `mutmut show NAME`, in the group's folder, shows what a mutant changes.
"""

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "mutants"
MUTMUT = [sys.executable, "-P", PROJECT / "scripts" / "quick_tests_first.py"]
LINKED = ("service", "triton_models", "tests", "benchmarks", "build_engines", "model_repository")
# Modules by group, each with its tests. These take seconds and start no server, but for the Redis of some in access.
# service/admission/admission.py is left out: it joins the other modules and is tested with them. Of upstreams, what
# follows changes of variants is left out: its tests start commands and take minutes.
GROUPS = {
    "access": (
        ["service/access/gate.py", "service/access/keys.py", "service/access/quotas.py", "service/access/windows.py"],
        ["tests/service/access/test_keys.py", "tests/service/access/test_quotas.py",
         # It starts a Python of its own, which has not loaded mutmut.
         "--deselect=tests/service/access/test_keys.py::test_the_owner_of_the_keys_changes_them_after_root_did"],
    ),
    "admission": (
        ["service/admission/batch_turns.py", "service/admission/concurrency_limit.py",
         "service/admission/contention.py", "service/admission/drain_rate.py", "service/admission/quota.py",
         "service/admission/scheduler.py"],
        ["tests/service/admission/test_admission.py", "tests/service/admission/test_batch_turns.py",
         "tests/service/admission/test_concurrency_limit.py", "tests/service/admission/test_contention.py",
         "tests/service/admission/test_quota.py", "tests/service/admission/test_scheduler.py",
         # It takes as long as twice all the others of the group.
         "--deselect=tests/service/admission/test_scheduler.py::test_nobody_starves_and_the_bound_of_the_docstring_holds"],
    ),
    "fidelity": (["service/admission/fidelity.py"], ["tests/service/admission/test_fidelity.py"]),
    "cache": (
        ["service/cache/breaker.py", "service/cache/lru.py", "service/cache/records.py",
         "service/cache/visual_tokens.py"],
        ["tests/service/cache/test_breaker.py", "tests/service/cache/test_lru.py",
         "tests/service/cache/test_record_bytes.py", "tests/service/cache/test_records.py",
         "tests/service/cache/test_visual_tokens.py"],
    ),
    "core": (["service/core/*.py"], ["tests/service/core"]),
    "batching": (
        ["triton_models/batcher.py", "triton_models/delivery.py"],
        ["tests/triton_models/test_batcher.py", "tests/triton_models/test_delivery.py"],
    ),
    "decoding": (
        ["triton_models/kv_pool.py", "triton_models/parameters.py", "triton_models/prefix_cache.py",
         "triton_models/sampling.py"],
        ["tests/triton_models/test_kv_pool.py", "tests/triton_models/test_parameters.py",
         "tests/triton_models/test_prefix_cache.py", "tests/triton_models/test_sampling.py"],
    ),
    "upstreams": (
        ["service/upstreams/balance.py", "service/upstreams/breaker.py", "service/upstreams/pool.py",
         "service/upstreams/readiness.py", "service/upstreams/resolve.py", "service/upstreams/retry_budget.py",
         "service/upstreams/variants.py"],
        ["tests/service/upstreams/test_balance.py", "tests/service/upstreams/test_breaker.py",
         "tests/service/upstreams/test_pool.py", "tests/service/upstreams/test_readiness.py",
         "tests/service/upstreams/test_resolve.py", "tests/service/upstreams/test_retry_budget.py",
         "tests/service/upstreams/test_variants.py"],
    ),
}  # fmt: skip
CONFIGURATION = """
[tool.mutmut]
source_paths = ["service", "triton_models"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["--hypothesis-profile=mutants", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
also_copy = ["benchmarks", "build_engines", "model_repository"]
timeout_constant = 25 # seconds: on a busy machine a process waits for its turn longer than it runs
timeout_multiplier = 6
process_isolation = "forkserver" # onnxruntime and gRPC, which tests import, do not survive a fork of a process in use
"""


def main(wanted: list[str]) -> int:
    """Return the exit status: 1 if mutmut failed or no group has such mutants."""
    chosen = [name for name, (modules, _) in GROUPS.items() if not wanted or any_of(modules, wanted)]
    if not chosen:
        print(f"No group has mutants named {' or '.join(wanted)}: give a name such as 'service.cache.lru*'")
        return 1
    status = 0
    for name in chosen:
        print(f"{name}: {', '.join(GROUPS[name][0])}", flush=True)
        folder = prepared(name)
        for words in (["run", *wanted], ["results"]):
            status = max(status, subprocess.run([*MUTMUT, *words], cwd=folder, check=False).returncode)
    return min(status, 1)


def any_of(modules: list[str], wanted: list[str]) -> bool:
    """Whether one of these patterns of mutants' names may be of one of the modules."""
    names = [module.removesuffix(".py").removesuffix("*").replace("/", ".") for module in modules]
    return any(pattern.startswith(name) or fnmatch(name, pattern) for pattern in wanted for name in names)


def prepared(group: str) -> Path:
    """Return the group's folder, with links to the sources and mutmut's configuration for this group."""
    modules, tests = GROUPS[group]
    folder = FOLDER / group
    folder.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(PROJECT / name)
    told = CONFIGURATION.format(modules=list_of(modules), tests=list_of(tests))
    (folder / "pyproject.toml").write_text((PROJECT / "pyproject.toml").read_text() + told)
    return folder


def list_of(words: list[str]) -> str:
    return "[" + ", ".join(f'"{word}"' for word in words) + "]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
