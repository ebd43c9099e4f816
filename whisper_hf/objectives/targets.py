"""What a student's predictions are compared with: a teacher's own predictions, or stored ones.

Legend: that of `divergences.py`; also `U` the width of the teacher, `k` stored tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .divergences import LOWEST_LOG, Divergence, Probabilities
from .lm_head import Head


class Target(Protocol):
    """A teacher's predictions for `n` tokens."""

    @property
    def vocabulary(self) -> int | None:
        """Number of leading tokens that student and teacher have in common; `None`: all of the student's."""

    def compare(self, q: Probabilities, rows: slice) -> tuple[Tensor, Tensor]:
        """Compare with the student's predictions for some of the tokens.

        Args:
            q ([`Probabilities`], `[m, V]`): the student's, at the temperature of the teacher's.
            rows (`slice`): which of the `n` tokens.

        Returns:
            divergences (`[m]`) and derivatives with respect to `log q` (`[m, V]`).
        """


@dataclass(frozen=True)
class TeacherTarget:
    """A teacher's hidden states and head.

    Attributes:
        hidden (`[n, U]`, any float): what the teacher's head sees.
        head ([`Head`]): the teacher's.
        divergence: from [`weighted_divergence`].
        temperature (`float`): of the softmax.
        has_partner (`[n]`, bool, *optional*): tokens without a partner in the teacher's text are left out.
        is_universal (`bool`): vocabularies have nothing in common; else token `i` means the same in both.
    """

    hidden: Tensor
    head: Head
    divergence: Divergence
    temperature: float = 1.0
    has_partner: Tensor | None = None
    is_universal: bool = False

    @property
    def vocabulary(self) -> int | None:
        """The teacher's; a larger padding than the student's is cut off, not filled."""
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
            value, derivative = value * self.has_partner[rows], derivative * self.has_partner[rows, None]
        return value, derivative


@dataclass(frozen=True)
class StoredTop:
    """The teacher's likeliest tokens, and what probability is left for all others together.

    The divergence is that of distributions over `k + 1` outcomes, the last of which is "any other token": nothing is
    renormalised, so a perfect student still reaches 0, and it never exceeds the divergence over all tokens.

    Attributes:
        tokens (`[n, k]`, int64): distinct.
        log_probabilities (`[n, k + 1]`, float): of them, and of any other token, in nats.
        divergence: from [`weighted_divergence`].
        vocabulary (`int`, *optional*): number of leading tokens that were predicted; `None`: all of the student's.
    """

    tokens: Tensor
    log_probabilities: Tensor
    divergence: Divergence
    vocabulary: int | None = None

    @torch.no_grad()
    def compare(self, q: Probabilities, rows: slice) -> tuple[Tensor, Tensor]:
        """See [`Target`]."""
        tokens = self.tokens[rows]
        p = Probabilities.from_logits(self.log_probabilities[rows].to(q.log.dtype))  # rounded, so not quite normalised
        others = q.log.scatter(1, tokens, LOWEST_LOG)
        rest = others.logsumexp(-1, keepdim=True)
        log_q = torch.cat([q.log.gather(1, tokens), rest], dim=1)
        value, derivative = self.divergence(p, Probabilities.from_log(log_q))
        # "any other" is a sum: its derivative is shared out by probability
        return value, others.sub_(rest).exp_().mul_(derivative[:, -1:]).scatter_(1, tokens, derivative[:, :-1])


@dataclass(frozen=True)
class StoredSamples:
    """Tokens drawn from the teacher's distribution, which estimate its forward KL and the gradient without bias.

    Truncating to the likeliest tokens and renormalising, as is usual, teaches a distribution that is too sure of
    itself. Anshumann et al. 2025 (Sparse Logit Sampling), https://arxiv.org/abs/2503.16870.

    Attributes:
        tokens (`[n, k]`, int64): drawn with replacement, each standing for a probability of `1 / k`.
        entropy (`[n]`, float): of the teacher's distribution, in nats.
        vocabulary (`int`, *optional*): number of leading tokens that were predicted; `None`: all of the student's.
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
