"""Distance of hidden states."""

from torch import Tensor


def relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`|s - t|^2 / |t|^2` of each token: 0 where they agree, 1 for a student that says nothing.

    As the mean squared error of TinyBERT (Jiao et al. 2019, https://arxiv.org/abs/1909.10351), but free of the
    layer's scale, which grows with depth and by orders of magnitude in a few tokens.

    Args:
        student (`[n, U]`, any float): projected to the teacher's width where widths differ.
        teacher (`[n, U]`, any float).

    Returns:
        `[n]`, float32: ratio.
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)


def spread_layers(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Pair every student layer with the teacher layer at the same relative depth, last with last, from 0."""
    return [(i, max(round((i + 1) * num_teacher / num_student) - 1, 0)) for i in range(num_student)]
