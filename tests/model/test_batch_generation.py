"""Many prompts at once: what each gets does not depend on its company, and nothing of it stays in memory.

In float64, where rounding (some 1e-15) cannot turn the choice of a token or of a block.
"""

import gc
import random
import weakref

import pytest
import torch
from transformers import PreTrainedTokenizerFast, pipeline

from whisper_hf import WhisperLMForCausalLM

from ..conftest import tiny_model

COUNT = 64
LONGEST = 420  # tokens, about nine times the budget
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
INT8 = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}
BEAMS = {"num_beams": 3}
KINDS = {"dynamic": {}, "static": {"cache_implementation": "static"}, "int8": INT8, "beams": BEAMS}
COMPARED = {"int8": 32, "beams": 12}  # prompts, where it is not all


@pytest.fixture(scope="module")
def model() -> WhisperLMForCausalLM:
    return tiny_model().double().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast, paragraphs: list[str]) -> list[str]:
    """Return texts of from 1 to `LONGEST` tokens, in no order."""
    book, generator = tokenizer.encode(" ".join(paragraphs)), random.Random(0)
    lengths = [1, 15, 16, 17, 47, 48, 49, LONGEST]
    lengths += [generator.randint(2, LONGEST) for _ in range(COUNT - len(lengths))]
    generator.shuffle(lengths)
    return [tokenizer.decode(book[100 * i : 100 * i + length]) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def alone(model, tokenizer, prompts) -> dict[str, list[list[int]]]:
    """Return the tokens that the model writes after each prompt by itself."""
    kinds = {"dynamic": {}, "int8": INT8, "beams": BEAMS}
    written = {kind: write(model, tokenizer, prompts[: COMPARED.get(kind)], 1, kinds[kind]) for kind in kinds}
    return written | {"static": written["dynamic"]}


def write(model, tokenizer, prompts: list[str], batch_size: int, options: dict) -> list[list[int]]:
    """Return the tokens written after each prompt, so many prompts at a time."""
    written = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        outputs = model.generate(**batch, **GREEDY, **options)
        written += outputs[:, batch["input_ids"].shape[1] :].tolist()
    return written


@pytest.mark.parametrize(("kind", "batch_size"), [*((kind, COUNT) for kind in KINDS), ("dynamic", 7), ("static", 7)])
def test_a_batch_writes_what_single_prompts_do(kind: str, batch_size: int, model, tokenizer, prompts, alone) -> None:
    together = write(model, tokenizer, prompts, batch_size, KINDS[kind])
    assert len(together) == COUNT
    assert together[: len(alone[kind])] == alone[kind]
    assert len(set(map(tuple, alone[kind]))) > len(alone[kind]) / 2  # what is written depends on the prompt


def test_a_pipeline_with_batches_writes_the_same_text(model, tokenizer, prompts, alone) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    outputs = generator(prompts, batch_size=16, return_full_text=False, **GREEDY)
    texts = [output[0]["generated_text"] for output in outputs]
    assert texts == tokenizer.batch_decode(alone["dynamic"], skip_special_tokens=True)


def test_continuous_batching_is_refused() -> None:
    """By transformers for `masked_sparse`; by the model for what transformers would take."""
    with pytest.raises(ValueError, match="masked_sparse is not supported for continuous batching"):
        tiny_model().generate_batch([[5, 6, 7]])
    for implementation in ("masked_sparse", "sdpa", "eager"):
        dense = tiny_model(layer_types=["full_attention"] * 2, attn_implementation=implementation)
        with pytest.raises(ValueError, match=r"paged caches.*to_dense"):
            dense(torch.tensor([[5, 6, 7]]), read_index=[], is_causal=False, use_cache=False)


def live_bytes() -> int:
    """Return the memory of all tensors that Python knows of, in bytes."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_freed(kind: str, model, tokenizer, prompts) -> None:
    """The cache and all it holds die with the output, and calls leave nothing behind."""
    batch = tokenizer(prompts[:8], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    options = {**GREEDY, **KINDS[kind]}
    before = live_bytes()
    output = model.generate(**batch, **options, return_dict_in_generate=True)
    layers = output.cache.layers
    watched = [weakref.ref(held) for held in (output.cache, *layers, *(layer.keys for layer in layers))]
    kept = sum(layer.keys.numel() * layer.keys.element_size() for layer in layers)
    assert live_bytes() - before > 2 * kept  # values as well
    del output, layers
    assert live_bytes() == before
    assert not any(held() for held in watched)
    model.generate(**batch, **options)
    assert live_bytes() == before
