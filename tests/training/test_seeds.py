"""What is random in a step has a seed of its own: by training, step, purpose and part."""

import itertools

import pytest
import torch

from whisper_hf.distillation.on_policy import is_on_policy_step
from whisper_hf.training.seeds import step_seed


def test_every_argument_changes_the_seed() -> None:
    purposes = ("is on policy", "student's text", "monitor", "prefixes")
    seeds = {step_seed(*key) for key in itertools.product(range(4), range(40), purposes, range(3))}
    assert len(seeds) == 4 * 40 * len(purposes) * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(3, 14, "monitor", 1) == step_seed(3, 14, "monitor", 1)


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_the_decision_to_write_says_nothing_of_what_is_written(fraction: float) -> None:
    """The first draw of a step in which the student writes is uniform, not below the fraction of such steps."""
    draws = []
    for step in range(2000):
        if is_on_policy_step(fraction, 0, step):
            generator = torch.Generator().manual_seed(step_seed(0, step, "student's text"))
            draws.append(torch.rand((), generator=generator).item())
    assert abs(len(draws) / 2000 - fraction) < 0.03
    assert abs(sum(draws) / len(draws) - 0.5) < 0.1
    assert max(draws) > 0.9
