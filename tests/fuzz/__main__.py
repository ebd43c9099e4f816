"""Random cases against the reference, as many as wanted; stops at the first difference with the smallest such case.

    python -m tests.fuzz --cases 10000 --seed 0

The same seed gives the same cases. A failing `Case(...)` is run again by `fuzz_attention.check(Case(...))`.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import run_state_machine_as_test

from .. import conftest  # noqa: F401 (sets Triton up, before anything imports it)
from . import check_attention, check_caches, check_settings, draw_cases

STEPS = 12  # calls in an order of calls, at most
SHARES = {"attention": 1.0, "triton": 0.01, "caches": 0.05, "settings": 0.1}  # of the cases asked for
COUNTERS = (check_attention.seen, check_attention.calls, check_caches.seen, check_settings.seen)
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # it would leave a folder here


def options(cases: int) -> settings:
    """Return how Hypothesis runs: no case is kept for the next time, and slow ones are fine."""
    return settings(
        max_examples=cases,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


def run(name: str, cases: int, seed_: int) -> None:
    """Run one kind of cases.

    Raises:
        AssertionError: a difference; Hypothesis adds the smallest case that shows it.
    """
    if name == "caches":
        for number, kind in enumerate(check_caches.KINDS):
            machine = seed(seed_ + number)(type(kind, (check_caches.Caches,), {"kind": kind}))
            run_state_machine_as_test(machine, settings=options(-(-cases // len(check_caches.KINDS))))
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
    """Run every kind, and print what was run."""
    torch.use_deterministic_algorithms(True)  # which also fills what is allocated and not written with NaN
    for name in only:
        start, count = time.perf_counter(), max(round(cases * SHARES[name]), 1)
        for counter in COUNTERS:
            counter.clear()
        run(name, count, seed_)
        print(f"{name}: {count} cases, seed {seed_}, {time.perf_counter() - start:.0f} s, no difference")
        for counter in COUNTERS:
            for what, times in sorted(counter.items()):
                print(f"  {times:8,} {what}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000, help="of attention; the other kinds take a share of that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES))
    arguments = parser.parse_args()
    main(arguments.cases, arguments.seed, arguments.only)
