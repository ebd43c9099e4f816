"""Rules about labels and documents: one function each, and what depends on them."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from whisper_hf import from_dense
from whisper_hf.model.labels import IGNORED, documents_from_positions, items_in_batch, shift

from ..conftest import LENGTH, SIZES, SPARSE, tiny_model, tokens

GAP = torch.cat([torch.arange(100), torch.arange(140, LENGTH + 40)])[None]  # jumps ahead, restarts nowhere


def test_a_document_begins_where_positions_fall_or_stay() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [3, 4, 9, 10, 10, 11, 2, 3]])
    assert documents_from_positions(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 1, 1, 2, 2]]


def test_labels_move_to_the_position_that_predicts_them() -> None:
    assert shift(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORED]]


@pytest.mark.parametrize(
    ("given", "shifted", "expected"), [(None, None, 1), (None, True, 2), (7, None, 7), (0, None, 1)]
)
def test_items_are_those_that_something_predicts(given: int | None, shifted: bool | None, expected: int) -> None:
    labels = torch.tensor([[5, IGNORED, 7]])  # the first label of a row has no prediction
    assert int(items_in_batch(labels, given, labels if shifted else None)) == expected


def test_nothing_to_learn_divides_by_one() -> None:
    assert int(items_in_batch(torch.full((1, 3), IGNORED), None, None)) == 1


@pytest.mark.parametrize("backend", ["masked_sparse", "eager", "sdpa"])
def test_a_gap_in_positions_is_no_new_document(backend: str) -> None:
    """In one pass and token by token, several times longer than the budget."""
    model = tiny_model(attn_implementation=backend)
    cache, ids = DynamicCache(config=model.config), tokens(1)
    with torch.no_grad():
        whole = model(ids, position_ids=GAP).logits
        steps = [model(ids[:, t : t + 1], position_ids=GAP[:, t : t + 1], cache=cache) for t in range(LENGTH)]
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), whole, rtol=1e-4, atol=1e-4)


def test_a_gap_gives_the_dense_logits_within_the_budget() -> None:
    """Llama with its default `use_cache=True` attends across a gap; without a cache transformers cuts there."""
    dense = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    sparse = from_dense(dense, sparse_attention={**SPARSE, "topk_blocks": 20}).eval()
    ids = tokens(1)
    with torch.no_grad():
        logits = sparse(ids, position_ids=GAP).logits
        torch.testing.assert_close(logits, dense(ids, position_ids=GAP).logits, rtol=1e-4, atol=1e-5)
        cut = dense(ids, position_ids=GAP, use_cache=False).logits
    assert (logits - cut)[:, 100:].abs().max() > 1e-3


def test_documents_that_restart_do_not_see_one_another() -> None:
    model, ids = tiny_model(), tokens(1)
    positions = torch.cat([torch.arange(90), torch.arange(LENGTH - 90)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = model(ids[:, 90:]).logits
    torch.testing.assert_close(packed[:, 90:], alone, rtol=1e-4, atol=1e-5)
