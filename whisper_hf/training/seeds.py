"""One seed per optimizer step, so that what is random in a step does not depend on where a training was resumed."""


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """Mix a seed with an optimizer step and a part of it, such as a process or a batch, into a seed of their own.

    `(seed * 1_000_003 + step) * 1009 + part`: distinct for any two parts below 1,009 of any two steps below 1,000,003.
    """
    return (seed * 1_000_003 + step) * 1009 + part
