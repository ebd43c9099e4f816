"""Block selection against a second statement of its rules, in plain Python, one query at a time."""

import math

import pytest
import torch

from whisper_hf.model.configuration_whisper_lm import SparseAttentionConfig
from whisper_hf.model.sparse_selection import (
    block_scores,
    content_layout,
    query_slots,
    selected_keys,
    top_blocks,
    top_recent,
    visible_keys,
)

SETTINGS = SparseAttentionConfig(block_size=16, topk_blocks=2, local_blocks=2, sink_blocks=1)


def allowed_in_plain_python(query, key, document, shown, settings) -> torch.Tensor:
    """One sequence: query `[H, T, D]`, key `[K, T, D]`, per token its document and if it is shown -> `[K, T, T]`."""
    kv_heads, length = key.shape[:2]
    size = settings.block_size
    allowed = torch.zeros(kv_heads, length, length, dtype=torch.bool)
    for head in range(kv_heads):
        group = query.shape[0] // kv_heads
        for token in range(length):
            past = [j for j in range(token + 1) if shown[j] and document[j] == document[token]]
            blocks = [past[start : start + size] for start in range(0, len(past), size)]
            current = len(blocks) - 1
            fixed = {b for b in range(len(blocks)) if b < settings.sink_blocks or b > current - settings.local_blocks}
            scores = dict.fromkeys(set(range(current)) - fixed, -math.inf)
            for own in query[head * group : (head + 1) * group, token]:
                products = [float(own @ key[head, block].mean(0)) for block in blocks[:current]]
                for b in scores:
                    scores[b] = max(scores[b], products[b] - max(products))
            best = sorted(scores, key=lambda b: (scores[b], b), reverse=True)[: settings.topk_blocks]
            for b in fixed | set(best):
                allowed[head, token, blocks[b]] = True
    return allowed


def case(name: str, length: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (document, shown) of one sequence, each `[length]`."""
    document, shown = torch.ones(length, dtype=torch.int), torch.ones(length, dtype=torch.bool)
    if name == "left padding":
        shown[:37] = False
    elif name == "right padding":
        shown[-37:] = False
    elif name == "holes":
        shown[torch.randperm(length)[:60]] = False
    elif name == "packed":
        document += (torch.arange(length) >= 23).int() + (torch.arange(length) >= 140).int()
    elif name == "all hidden":
        shown[:] = False
    return document, shown


@pytest.mark.parametrize("name", ["plain", "left padding", "right padding", "holes", "packed", "all hidden"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_selection_matches_plain_python(name: str, kv_heads: int) -> None:
    document, shown = case(name)
    query, key = torch.randn(1, 4, 200, 8), torch.randn(1, kv_heads, 200, 8)
    starts = torch.diff(document, prepend=document[:1]) > 0
    layout = content_layout(shown[None], starts[None], 200)
    visible = visible_keys(layout, query_slots(layout, 200, 200, key.device), 200)
    allowed = selected_keys(query, key, visible, SETTINGS)
    expected = allowed_in_plain_python(query[0], key[0], document, shown, SETTINGS)
    assert torch.equal(allowed[0], expected)
    if name in ("plain", "left padding"):
        assert allowed[0].sum(-1).max() <= SETTINGS.budget_blocks * SETTINGS.block_size < shown.sum()


def test_every_key_head_selects_for_itself_and_each_token_anew() -> None:
    query, key = torch.randn(1, 4, 320, 8), torch.randn(1, 2, 320, 8)
    visible = visible_keys(None, query_slots(None, 320, 320, key.device), 320)
    allowed = selected_keys(query, key, visible, SETTINGS)
    assert not torch.equal(allowed[0, 0], allowed[0, 1])
    far = allowed[0, 0, 256:272, 16:224].unflatten(-1, (-1, 16)).any(-1)  # queries of one block, their chosen blocks
    assert len(set(map(tuple, far.tolist()))) > 1


def test_ties_go_to_the_more_recent_block() -> None:
    query, key = torch.zeros(1, 1, 160, 8), torch.randn(1, 1, 160, 8)
    visible = visible_keys(None, query_slots(None, 160, 160, key.device), 160)
    allowed = selected_keys(query, key, visible, SETTINGS)[0, 0, -1].unflatten(0, (10, 16)).all(-1)
    assert allowed.nonzero().flatten().tolist() == [0, 6, 7, 8, 9]  # the sink, two by recency, two local


def test_top_blocks_marks_candidates_only() -> None:
    scores = torch.tensor([[5.0, 1.0, 7.0, 1.0, 9.0]])
    candidate = torch.tensor([[True, True, False, True, False]])
    assert top_blocks(scores, candidate, 2).tolist() == [[True, False, False, True, False]]
    assert top_blocks(scores, candidate, 9).tolist() == candidate.tolist()
    assert not top_blocks(scores, candidate, 0).any()


@pytest.mark.parametrize("rows", [3, 300])  # few are sorted by torch, many are parted by numpy
def test_the_largest_are_found_among_many_equals(rows: int) -> None:
    scores = torch.randint(0, 5, (rows, 2, 40)).float()
    scores[scores == 0] = -math.inf
    scores[0] = -math.inf
    scores[1] = torch.randn(2, 40)
    for topk in (1, 7, 39):
        found = top_recent(scores.clone(), topk).sort(-1).values.flatten(0, 1)
        for row, indices in zip(scores.flatten(0, 1).tolist(), found.tolist(), strict=True):
            best = sorted(range(40), key=lambda b: (row[b], b), reverse=True)[:topk]
            there = [b for b in best if row[b] > -math.inf]
            assert [b for b in indices if row[b] > -math.inf] == sorted(there)
            assert len(set(indices)) == topk


def test_budget_of_zero_topk_is_sink_and_window_only() -> None:
    settings = SparseAttentionConfig(block_size=16, topk_blocks=0, local_blocks=1, sink_blocks=0)
    query, key = torch.randn(1, 1, 100, 8), torch.randn(1, 1, 100, 8)
    visible = visible_keys(None, query_slots(None, 100, 100, key.device), 100)
    allowed = selected_keys(query, key, visible, settings)[0, 0]
    blocks = torch.arange(100) // 16
    assert torch.equal(allowed, visible[0, 0] & (blocks[:, None] == blocks))


def test_layout_marks_slots_beyond_the_queries_as_unwritten() -> None:
    shown = torch.tensor([[False, True, True, True, True, True]])
    layout = content_layout(shown, torch.zeros_like(shown), query_end=4)
    assert layout.flatten().tolist() == [-1, 1, 1, 1, 0, 0]
    assert query_slots(layout, 2, 6, layout.device).tolist() == [[2, 3]]


def test_selection_carries_no_gradient() -> None:
    query = torch.randn(1, 2, 100, 8, requires_grad=True)
    visible = visible_keys(None, query_slots(None, 100, 100, query.device), 100)
    assert not selected_keys(query, query, visible, SETTINGS).requires_grad


def test_each_head_scores_for_itself() -> None:
    loud, quiet = [90.0, 70.0, 10.0, 80.0], [0.0, 5.0, 4.0, 1.0]
    assert block_scores(torch.tensor([loud, quiet])).tolist() == [0.0, 0.0, -1.0, -4.0]
    shifted = torch.tensor([loud, quiet]) + torch.tensor([[-500.0], [3.0]])
    assert block_scores(shifted).tolist() == [0.0, 0.0, -1.0, -4.0]


def test_only_the_past_counts() -> None:
    products = torch.tensor([[[1.0, 3.0, 9.0], [6.0, 2.0, 7.0]]])
    scores = block_scores(products.clone(), torch.tensor([True, True, False]))
    assert scores[0, :2].tolist() == [0.0, 0.0]
    changed = block_scores(products + torch.tensor([0.0, 0.0, 5.0]), torch.tensor([True, True, False]))
    assert torch.equal(changed[0, :2], scores[0, :2])
