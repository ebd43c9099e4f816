# Copyright 2026 The whisper_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A training loss that encourages diversity by penalising the tokens that would continue a repetition.

Legend: `B` rows of `T` tokens, `n` of which are predicted from and count, `C` candidates for each, `V` vocabulary.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .configuration_whisper_lm import DiversityConfig
from .labels import IGNORED, shift

logger = logging.get_logger(__name__)

NONE = -1  # fills the places of candidates that do not exist


def repeating_tokens(
    input_ids: Tensor, targets: Tensor, documents: Tensor | None = None, *, window: int = 512, most: int = 8
) -> Tensor:
    """Find the tokens that would continue a repetition.

    A candidate at a position is a token that followed an earlier occurrence of the last two tokens. Three kinds of
    tokens are never candidates: a token that merely occurred before, as most repetition of single words is legitimate;
    a token of a prompt, as answers often quote it; and the true next token, as people repeat themselves, too.

    Args:
        input_ids (`[B, T]`, int64): the text.
        targets (`[B, T]`, int64): the token to predict from each position; -100 for prompts and padding.
        documents (`[B, T]`, int64, *optional*): number of the document of each token; a repetition lies in one.
        window (`int`): how far back to search, in tokens.
        most (`int`): `C`, the number of candidates of each position; the most recent ones are returned.

    Returns:
        `[B, T, C]`, int64: distinct tokens, -1 in unused places.
    """
    size = int(input_ids.numel())
    row = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
    document = row if documents is None else row * (documents.max() + 1) + documents
    last_two = torch.stack([document[:, 1:], input_ids[:, :-1], input_ids[:, 1:]], dim=-1)
    same = document[:, 1:] == document[:, :-1]
    base = input_ids.max() + 1
    key = torch.full_like(input_ids, NONE)
    key[:, 1:] = torch.where(same, (last_two[..., 0] * base + last_two[..., 1]) * base + last_two[..., 2], NONE)

    key, target = key.flatten(), targets.flatten()
    order = key.argsort(stable=True)  # occurrences of the same two tokens become neighbours, in order of position
    place = torch.arange(size, device=key.device)
    found = target.new_full((size, most), NONE)
    for back in range(1, min(most, size - 1) + 1):
        here, before = order[back:], order[:-back]
        continues = (key[here] == key[before]) & (key[here] != NONE) & (place[here] - place[before] <= window)
        candidate = target[before]
        is_new = (found[here, : back - 1] != candidate[:, None]).all(1) & (candidate != target[here])
        found[here, back - 1] = torch.where(continues & (candidate >= 0) & is_new, candidate, NONE)
    return found.view(*input_ids.shape, most)


def contrast_loss(logits: Tensor, labels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `log(1 + sum_c exp(z_c - z_y))` of each token, which asks that every candidate be less likely than it.

    This is the contrastive token loss (Jiang et al. 2022, https://arxiv.org/abs/2205.02517) over the candidates of
    [`repeating_tokens`], computed stably for any difference of logits.

    Args:
        logits (`[n, V]`, float32 or float64).
        labels (`[n]`, int64): the true tokens.
        candidates (`[n, C]`, int64): distinct tokens other than the true one; -1 in unused places.

    Returns:
        the loss (`[n]`, nats), and its derivatives with respect to the logits of the candidates (`[n, C]`) and of the
        true token (`[n]`).
    """
    gaps = _gaps(logits, labels, candidates)
    value = contrast(gaps)
    derivative = (gaps - value[:, None]).exp()
    return value, derivative, -derivative.sum(-1)


def _gaps(logits: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
    """Return the logit of each candidate minus the logit of the true token, `[n, C]`; `-inf` in unused places."""
    gaps = logits.gather(1, candidates.clamp(min=0)) - logits.gather(1, labels[:, None])
    return gaps.masked_fill(candidates == NONE, float("-inf"))


def contrast(gaps: Tensor) -> Tensor:
    """Return `log(1 + sum exp gap)`, `[...]`, of the gaps of candidates, `[..., C]`; a gap of `-inf` adds nothing."""
    return nn.functional.pad(gaps, (1, 0)).logsumexp(-1)


def diverse_causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    *,
    diversity: DiversityConfig,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute cross-entropy plus, in training, `contrast_weight` times the contrast with repeating tokens.

    It replaces transformers' `ForCausalLMLoss` and takes the same arguments; without gradients it equals it. Only
    labelled tokens are searched for repetitions: prompts, padding and everything across them are left out.

    With `gem_beta`, training minimises `beta * cross-entropy(logits / beta)` instead of cross-entropy. Its gradient,
    `softmax(logits / beta) - onehot`, equals the gradient of GEM with linear `h`, which the paper defines by a
    constant `q`.

    Args:
        logits (`[B, T, V]`, any float): predictions.
        labels (`[B, T]`, int64): the token at each position, or -100; they are shifted inside.
        vocab_size (`int`): `V`.
        num_items_in_batch (`int` or 0-dim tensor, *optional*): divisor of both sums; by default the mean is taken.
        diversity (`DiversityConfig`): weight, window and temperature.
        shift_labels (`[B, T]`, int64, *optional*): labels that are shifted already.

    Returns:
        the loss, 0-dim float32, in nats per token.
    """
    beta = diversity.gem_beta if torch.is_grad_enabled() and diversity.gem_beta is not None else 1.0
    tempered = logits if beta == 1 else logits.float() / beta
    loss = beta * ForCausalLMLoss(tempered, labels, vocab_size, num_items_in_batch, shift_labels=shift_labels, **kwargs)
    if not torch.is_grad_enabled() or not diversity.contrast_weight:
        return loss
    if shift_labels is None:
        assert labels is not None  # the loss above fails without labels
        targets, tokens = shift(labels), labels
    else:
        targets, tokens = shift_labels, nn.functional.pad(shift_labels[:, :-1], (1, 0), value=IGNORED)
    targets, tokens = targets.to(logits.device), tokens.to(logits.device)
    hidden = tokens == IGNORED
    # number the stretches of labelled tokens; each unlabelled token is a stretch of its own
    stretches = 2 * hidden.cumsum(1) + ~hidden
    candidates = repeating_tokens(tokens.clamp(min=0), targets, stretches, window=diversity.window)
    counts = (candidates != NONE).any(-1) & (targets != IGNORED)
    penalty = contrast(_gaps(logits[counts].float(), targets[counts], candidates[counts])).sum()
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return loss + diversity.contrast_weight * penalty / count


def without_adapter(model: Any) -> Any:
    """Return the model inside a peft wrapper, or the model itself if it is not wrapped."""
    return getattr(model, "get_base_model", lambda: model)()


def use_diversity(model: Any, diversity: Any = True) -> Any:
    """Make a causal language model of any family train with the objective that encourages diversity, in place.

    Args:
        model (`PreTrainedModel`, or wrapped by peft): its loss must come from transformers' `loss_function`.
        diversity (`DiversityConfig`, `dict`, `True` or `None`): the settings, `True` for the defaults, or `None` to
            restore plain cross-entropy.

    Returns:
        the model.

    Raises:
        ValueError: the model's `loss_function` is not transformers' `ForCausalLMLoss`.
    """
    base = without_adapter(model)
    vars(base).pop("_loss_function", None)
    hook = vars(base).pop("_diversity_hook", None)
    if hook is not None:
        hook.remove()
    settings = DiversityConfig.from_value({} if diversity is True else diversity)
    if settings is None:
        return model
    if getattr(base, "loss_function", None) is not ForCausalLMLoss:
        raise ValueError(
            "the objective against repetition needs a causal language model with transformers' ForCausalLMLoss, got "
            f"{type(base).__name__}"
        )
    base.loss_function = functools.partial(diverse_causal_lm_loss, diversity=settings)
    vars(base)["_diversity_hook"] = base.register_forward_pre_hook(_warn_where_bypassed, with_kwargs=True)
    return model


def _warn_where_bypassed(model: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
    """Warn once about a forward pass in training without labels, whose loss is computed outside the model.

    A forward pass with `logits_to_keep` is not such a case: [`~whisper_hf.SequenceUnlikelihoodCallback`] makes it.
    """
    has_loss = kwargs.get("labels") is not None or kwargs.get("logits_to_keep")
    is_bypassed = model.training and torch.is_grad_enabled() and not has_loss
    if is_bypassed and not is_tracing():
        logger.warning_once(
            f"{type(model).__name__} trains without labels, so its diversity objective does nothing: the Trainer takes "
            "them away for label_smoothing_factor and compute_loss_func, and the DistillationTrainer has a "
            "diversity_weight of its own"
        )
