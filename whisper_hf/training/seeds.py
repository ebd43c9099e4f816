"""A seed for each optimizer step, so that the random choices of a step do not depend on where training resumed."""


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """Combine a seed, an optimizer step and a part of it, such as a process or a batch, into a new seed.

    `(seed * 1_000_003 + step) * 1009 + part`: seeds differ for all steps below 1,000,003 and all parts below 1,009.
    """
    return (seed * 1_000_003 + step) * 1009 + part
