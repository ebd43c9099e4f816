"""Targets of a student's predictions: the teacher's live predictions, or predictions stored on disk.

Legend: `n` tokens, `m` tokens of a chunk, `V` vocabulary of the student, `U` width of the teacher, `k` stored tokens of
a position, `p` and `q` the distributions of teacher and student.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .divergences import LOWEST_LOG, Divergence, Probabilities
from .lm_head import Head


class Target(Protocol):
    """A teacher's predictions for `n` tokens, to compare a student's predictions with."""

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that both models have, counted from token 0; `None` means all of the student's."""

    def compare(self, q: Probabilities, rows: slice) -> tuple[Tensor, Tensor]:
        """Compute the divergence of the student's predictions for some of the tokens.

        Args:
            q ([`Probabilities`], `[m, V]`): the student's distributions, at the teacher's temperature.
            rows (`slice`): which `m` of the `n` tokens.

        Returns:
            divergences (`[m]`, nats or a ratio) and derivatives with respect to `log q` (`[m, V]`).
        """


@dataclass(frozen=True)
class TeacherTarget:
    """A teacher's predictions, as the hidden states and the head that give its logits.

    Attributes:
        hidden (`[n, U]`, any float): the inputs of the teacher's head.
        head ([`Head`]): the teacher's head.
        divergence: a function from [`weighted_divergence`].
        temperature (`float`): the temperature of the softmax.
        has_partner (`[n]`, bool, *optional*): whether a token has a partner in the teacher's text. The divergence is 0
            where it has no partner.
        is_universal (`bool`): whether the vocabularies are unrelated. Otherwise token `i` is the same in both.
    """

    hidden: Tensor
    head: Head
    divergence: Divergence
    temperature: float = 1.0
    has_partner: Tensor | None = None
    is_universal: bool = False

    @property
    def vocabulary(self) -> int | None:
        """The size of the teacher's vocabulary, or `None` if the vocabularies are unrelated.

        It may exceed the student's by padding, which is then cut off.
        """
        return None if self.is_universal else self.head.vocabulary

    @torch.no_grad()
    def compare(self, q: Probabilities, rows: slice) -> tuple[Tensor, Tensor]:
        """See [`Target`]."""
        logits = self.head(self.hidden[rows]).to(q.log.dtype)
        if not self.is_universal:
            logits = logits[:, : q.log.shape[1]]
        p = Probabilities.from_logits(logits if self.temperature == 1 else logits / self.temperature)
        value, derivative = self.divergence(p, q)
        if self.has_partner is not None:
            value = value * self.has_partner[rows]
            derivative = derivative * self.has_partner[rows, None]
        return value, derivative


@dataclass(frozen=True)
class StoredTop:
    """The stored probabilities of the teacher's `k` likeliest tokens and of all other tokens together.

    The divergence compares distributions over `k + 1` outcomes, the last of which is "any other token". The `k`
    probabilities are not rescaled to a sum of 1. A perfect student therefore reaches 0, and the value never exceeds the
    divergence over all tokens.

    Attributes:
        tokens (`[n, k]`, int64): the likeliest tokens of each position, distinct.
        log_probabilities (`[n, k + 1]`, any float): the log-probabilities of these tokens, and last of any other token,
            in nats.
        divergence: a function from [`weighted_divergence`].
        vocabulary (`int`, *optional*): number of tokens that the teacher predicts, counted from token 0; `None` means
            all of the student's.
    """

    tokens: Tensor
    log_probabilities: Tensor
    divergence: Divergence
    vocabulary: int | None = None

    @torch.no_grad()
    def compare(self, q: Probabilities, rows: slice) -> tuple[Tensor, Tensor]:
        """See [`Target`]."""
        tokens = self.tokens[rows]
        # stored values are rounded, so they are normalised again
        p = Probabilities.from_logits(self.log_probabilities[rows].to(q.log.dtype))
        others = q.log.scatter(1, tokens, LOWEST_LOG)
        rest = others.logsumexp(-1, keepdim=True)
        log_q = torch.cat([q.log.gather(1, tokens), rest], dim=1)
        value, derivative = self.divergence(p, Probabilities.from_log(log_q))
        # "any other token" is a sum over tokens, each of which receives a share of its derivative by probability
        return value, others.sub_(rest).exp_().mul_(derivative[:, -1:]).scatter_(1, tokens, derivative[:, :-1])


@dataclass(frozen=True)
class StoredSamples:
    """Tokens drawn from the teacher's distribution, an unbiased estimate of the forward KL and its gradient.

    The usual truncation to the likeliest tokens, renormalised, teaches a distribution that is too sure of itself.
    Anshumann et al. 2025 (Sparse Logit Sampling), https://arxiv.org/abs/2503.16870.

    Attributes:
        tokens (`[n, k]`, int64): tokens drawn with replacement; each stands for a probability of `1 / k`.
        entropy (`[n]`, any float): the entropy of the teacher's distribution, in nats.
        vocabulary (`int`, *optional*): number of tokens that the teacher predicts, counted from token 0; `None` means
            all of the student's.
    """

    tokens: Tensor
    entropy: Tensor
    vocabulary: int | None = None

    @torch.no_grad()
    def compare(self, q: Probabilities, rows: slice) -> tuple[Tensor, Tensor]:
        """See [`Target`]."""
        tokens = self.tokens[rows]
        value = -q.log.gather(1, tokens).mean(-1) - self.entropy[rows]
        weights = q.log.new_full(tokens.shape, -1 / tokens.shape[1])
        return value, torch.zeros_like(q.log).scatter_add_(1, tokens, weights)
