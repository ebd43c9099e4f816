"""Compare the fast paths with the reference in random cases, until all are run or one differs.

    python -m tests.fuzz --cases 10000 --seed 0

The same seed gives the same cases. At the first difference, Hypothesis searches for the smallest case that shows it,
and prints it. `tests.fuzz.check_attention.check(Case(...))` runs a case of attention again.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import run_state_machine_as_test

from .. import conftest  # noqa: F401 (configures Triton before it is imported)
from . import check_attention, check_caches, check_settings, draw_cases

STEPS = 12  # most calls in a sequence of calls on a cache
SHARES = {"attention": 1.0, "triton": 0.01, "caches": 0.05, "settings": 0.1}  # kind -> cases, as a share of --cases
COUNTERS = (check_attention.seen, check_attention.calls, check_caches.seen, check_settings.seen)
set_hypothesis_home_dir(
    Path(tempfile.gettempdir()) / "hypothesis"
)  # by default it writes a folder into the working directory


def options(cases: int) -> settings:
    """Return the settings of Hypothesis: it stores no cases, and accepts slow ones."""
    return settings(
        max_examples=cases,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


def run(name: str, cases: int, seed_: int) -> None:
    """Run a number of cases of one kind.

    Raises:
        AssertionError: a case differs from the reference; Hypothesis adds the smallest one that it finds.
    """
    if name == "caches":
        for number, kind in enumerate(check_caches.KINDS):
            machine = seed(seed_ + number)(type(kind, (check_caches.Caches,), {"kind": kind}))
            run_state_machine_as_test(machine, settings=options(math.ceil(cases / len(check_caches.KINDS))))
        return
    strategy, check = {
        "attention": (draw_cases.cases(), check_attention.check),
        "triton": (draw_cases.cases(triton=True), check_attention.check),
        "settings": (check_settings.VALUES, check_settings.check),
    }[name]

    @seed(seed_)
    @options(cases)
    @given(strategy)
    def test(case: object) -> None:
        check(case)

    test()


def main(cases: int, seed_: int, only: list[str]) -> None:
    """Run all kinds of cases, and print what the cases have covered."""
    torch.use_deterministic_algorithms(
        True
    )  # it also fills new tensors with NaN, so that reading unwritten memory is noticed
    for name in only:
        start = time.perf_counter()
        count = max(round(cases * SHARES[name]), 1)
        for counter in COUNTERS:
            counter.clear()
        run(name, count, seed_)
        print(f"{name}: {count} cases, seed {seed_}, {time.perf_counter() - start:.0f} s, no difference")
        for counter in COUNTERS:
            for what, times in sorted(counter.items()):
                print(f"  {times:8,} {what}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, default=10000, help="cases of attention; other kinds run a share of this number"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES))
    arguments = parser.parse_args()
    main(arguments.cases, arguments.seed, arguments.only)
