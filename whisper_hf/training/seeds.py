"""Seeds of what is random in an optimizer step: they depend on the step, not on where the training was resumed."""

import hashlib


def step_seed(seed: int, step: int, purpose: str, part: int = 0) -> int:
    """Hash a training's seed, an optimizer step and a purpose to one seed for a random generator.

    Args:
        seed: the seed of the training.
        step: the number of the optimizer step.
        purpose: what is drawn; two purposes have unrelated seeds in the same step.
        part: a part of the step, such as the index of a process or of a batch.

    Returns:
        an integer of 63 bits.
    """
    digest = hashlib.blake2b(f"{seed} {step} {purpose} {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
