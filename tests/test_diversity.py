"""The objective against repetition: which tokens it discourages, and by how much."""

import pytest
import torch
from torch import nn

from whisper_hf.objectives import chunked_distillation_loss, contrast_loss, repeating_tokens

TEXT = torch.randint(0, 4, (3, 90), generator=torch.Generator().manual_seed(0))  # few tokens, much repetition


def repeating_tokens_reference(ids: list, targets: list, documents: list, window: int, most: int) -> list[list[int]]:
    """State the rule again for one row: what followed the last two tokens when they came before."""
    rows = []
    for t in range(len(ids)):
        found: list[int] = []
        for s in range(t - 1, 0, -1):
            same = ids[s - 1 : s + 1] == ids[t - 1 : t + 1] and t > 0
            if len({documents[i] for i in (s - 1, s, t - 1, t)}) > 1 or not same or t - s > window:
                continue
            found.append(targets[s])
        recent = found[:most]
        kept = [c for i, c in enumerate(recent) if c >= 0 and c != targets[t] and c not in recent[:i]]
        rows.append(sorted(kept))
    return rows


@pytest.mark.parametrize("window", [10, 500])
@pytest.mark.parametrize("kind", ["plain", "prompt", "packed"])
def test_candidates_are_those_of_the_rule(kind: str, window: int) -> None:
    targets = nn.functional.pad(TEXT[:, 1:], (0, 1), value=-100)
    documents = None
    if kind == "prompt":
        targets[:, :40] = -100
    if kind == "packed":
        documents = (torch.arange(90) // 30).expand(3, -1)
        targets[:, 29::30] = -100
    found = repeating_tokens(TEXT, targets, documents, window=window, most=4)
    assert found.shape == (3, 90, 4)
    for row in range(3):
        owner = [0] * 90 if documents is None else documents[row].tolist()
        expected = repeating_tokens_reference(TEXT[row].tolist(), targets[row].tolist(), owner, window, 4)
        assert [sorted(c for c in candidates if c >= 0) for candidates in found[row].tolist()] == expected
    assert (found >= 0).any()


def test_text_without_repetition_has_no_candidates() -> None:
    ids = torch.arange(50)[None]
    assert (repeating_tokens(ids, nn.functional.pad(ids[:, 1:], (0, 1), value=-100)) == -1).all()
    repeated = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])  # people who repeat themselves are left alone
    assert (repeating_tokens(repeated, torch.tensor([[2, 3, 1, 2, 3, 1, 2, 3]])) == -1).all()


def test_short_rows_have_no_candidates() -> None:
    assert repeating_tokens(torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)).shape == (2, 1, 8)


def test_contrast_and_its_derivative() -> None:
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (6,))
    candidates = torch.tensor([[4, 5, -1], [6, -1, -1], [-1, -1, -1], [7, 8, 9], [-1, 10, -1], [-1, -1, -1]])
    weights = (candidates >= 0).double()
    gaps = logits.gather(1, candidates.clamp(min=0)) - logits.gather(1, labels[:, None])
    expected = (1 + (gaps.exp() * weights).sum(1)).log()
    value, at_candidates, at_label = contrast_loss(logits.detach(), labels, candidates)
    torch.testing.assert_close(value, expected.detach())
    gradient = torch.zeros_like(logits).scatter_add_(1, candidates.clamp(min=0), at_candidates)
    gradient = gradient.detach().scatter_add_(1, labels[:, None], at_label[:, None])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])
    assert (value[[2, 5]] == 0).all()


@pytest.mark.parametrize("gap", [-500.0, 15.0, 500.0])
def test_contrast_is_finite_and_still_pushes_at_any_gap(gap: float) -> None:
    value, at_candidates, at_label = contrast_loss(torch.tensor([[0.0, gap]]), torch.tensor([0]), torch.tensor([[1]]))
    assert value.item() == pytest.approx(max(gap, 0.0), abs=1e-5)
    assert at_candidates.item() == pytest.approx(float(gap > 0), abs=1e-5)
    assert at_label.item() == -at_candidates.item()


def test_chunked_loss_with_contrast_is_the_sum_of_its_parts() -> None:
    head, hidden = nn.Linear(8, 30), torch.randn(25, 8, requires_grad=True)
    labels, candidates = (
        torch.randint(0, 10, (25,)),
        torch.randint(10, 30, (25, 1)).masked_fill(torch.rand(25, 1) < 0.5, -1),
    )
    losses = chunked_distillation_loss(
        hidden,
        head,
        labels,
        None,
        cross_entropy_weight=0.5,
        diversity_weight=2.0,
        candidates=candidates,
        chunk_tokens=4,
    )
    logits = head(hidden)
    gap = logits.gather(1, candidates.clamp(min=0)) - logits.gather(1, labels[:, None])
    contrast = nn.functional.softplus(gap)[:, 0] * (candidates[:, 0] >= 0)
    expected = 0.5 * nn.functional.cross_entropy(logits, labels, reduction="sum") + 2 * contrast.sum()
    torch.testing.assert_close(losses.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.diversity, contrast.detach())
    wanted = [hidden, head.weight, head.bias]
    for got, gradient in zip(
        torch.autograd.grad(losses.loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-5)
