"""The distance between hidden states of a student and a teacher, and which of their layers are paired.

Legend: `n` tokens, `U` width of the teacher.
"""

from torch import Tensor


def relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute `|s - t|^2 / |t|^2` for each token: 0 where the states are equal, 1 for a student state of 0.

    It differs from the mean squared error of TinyBERT (Jiao et al. 2019, https://arxiv.org/abs/1909.10351) by the
    denominator, which removes the scale of the states. This scale grows with depth, and a few tokens exceed the other
    tokens by orders of magnitude.

    Args:
        student (`[n, U]`, any float): the student's states, projected to the teacher's width where widths differ.
        teacher (`[n, U]`, any float): the teacher's states.

    Returns:
        `[n]`, float32: a ratio, at least 0.
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)


def spread_layers(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Pair every student layer with the teacher layer at the same relative depth.

    Args:
        num_student, num_teacher (`int`): numbers of layers.

    Returns:
        pairs of a student layer and a teacher layer, counted from 0. The last layers form the last pair.
    """
    return [(i, max(round((i + 1) * num_teacher / num_student) - 1, 0)) for i in range(num_student)]
