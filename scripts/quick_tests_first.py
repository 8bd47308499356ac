"""Run mutmut, with the quick tests of each mutant before its slow ones.

mutmut sorts them itself only if it forks without a server. Most mutants are noticed by a quick test.
"""

from mutmut.__main__ import cli
from mutmut.state import state
from mutmut.workers.isolation import ForkServerRunner

submit = ForkServerRunner.submit


def submit_quick_first(
    runner: ForkServerRunner, mutant_name: str, tests: list[str], cpu_time_limit: int, estimated_time: float
) -> None:
    tests = sorted(tests, key=state().duration_by_test.__getitem__)
    submit(runner, mutant_name, tests, cpu_time_limit, estimated_time)


if __name__ == "__main__":
    ForkServerRunner.submit = submit_quick_first
    cli()
