"""Measure competitors side by side: median times of alternating runs, and peak memory in a separate process."""

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
    """Time competitors in turns, A, B, A, B, so that other load on the machine affects all of them equally.

    Args:
        runs: the functions to time, by name. The first call of each is a warm-up and is not counted.
        seconds: about how long to measure, in seconds; at least one round is counted.
        most: largest number of counted rounds.
        rounds: the exact number of counted rounds, where several processes must run the same number; it replaces
            `seconds` and `most`.
        clock: the clock, in seconds; by default the process time, summed over all threads.

    Returns:
        the median of the seconds of each competitor, by name.
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
        arguments: the arguments of `prepare`.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, *arguments))


def _peak(prepare: Callable[..., Run], *arguments: object) -> float:
    """Measure the peak memory of a run in this process, above what was resident before it, in MB."""
    run = prepare(*arguments)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
    run()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """Read a field of this process's memory from Linux, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
