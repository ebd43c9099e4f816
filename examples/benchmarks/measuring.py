"""Side-by-side measurements: alternating runs, medians, ratios, and peak memory in a process of its own."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[], object]


def alternate(
    runs: dict[str, Run],
    seconds: float = 3.0,
    most: int = 15,
    rounds: int | None = None,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Time competitors in turns, A, B, A, B, so that what else the machine does falls on all alike.

    Args:
        runs: a name and a function each; one call of each warms up and is not counted.
        seconds: go on for about this long, but at least for one counted round ...
        most: ... and at most for so many.
        rounds: or for just so many, where processes must do the same.
        clock: what is measured, by default process time (of all threads together).

    Returns:
        Median seconds for each name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.monotonic()
    for run in runs.values():
        run()
    warm = time.monotonic() - start
    rounds = rounds or max(1, min(most, int(seconds / max(warm, 1e-9))))
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(prepare: Callable[..., Run], *arguments: object) -> float | None:
    """Return the peak memory of a run above what was resident before it, in MB (Linux; elsewhere `None`).

    Args:
        prepare: a module-level function; called with the arguments in a new process, it returns the run.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, *arguments))


def _peak(prepare: Callable[..., Run], *arguments: object) -> float:
    run = prepare(*arguments)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    run()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
