"""`generate` and pipelines, unchanged: every strategy and cache against the forward pass without a cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, pipeline

from ..conftest import LENGTH, tiny_model, tokens

NEW = 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


def greedy_without_cache(model, ids: torch.Tensor, steps: int = NEW) -> torch.Tensor:
    """Append the most likely token `steps` times, each time from a full forward pass."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("backend", ["eager", "sdpa", "masked_sparse"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 50}],
    ids=["dynamic", "static", "no cache", "chunked prefill"],
)
def test_greedy_equals_full_forward(backend: str, options: dict) -> None:
    model = tiny_model(attn_implementation=backend).requires_grad_(False)
    expected = greedy_without_cache(model, tokens())
    assert torch.equal(model.generate(tokens(), **GREEDY, **options), expected)
    dense = tiny_model(layer_types=["full_attention"] * 2).requires_grad_(False)
    assert not torch.equal(greedy_without_cache(dense, tokens()), expected)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 4}, {"assistant": True}], ids=["lookup", "draft model"]
)
def test_assisted_equals_greedy(model, options: dict) -> None:
    if options.pop("assistant", False):
        draft = tiny_model()
        draft.lm_head.weight.data += 0.02 * torch.randn_like(draft.lm_head.weight)  # often right, sometimes wrong
        options["assistant_model"] = draft
    ids = tokens(1)
    assert torch.equal(model.generate(ids, **GREEDY, **options), greedy_without_cache(model, ids))


def test_beam_search_equals_itself_without_a_cache(model) -> None:
    options = {
        **GREEDY,
        "num_beams": 4,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    cached, plain = (model.generate(tokens(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=1e-4, atol=1e-4)


def test_sampling_draws_from_the_sparse_distribution(model) -> None:
    options = {**GREEDY, "do_sample": True, "top_k": 10, "temperature": 0.9, "num_return_sequences": 2}
    torch.manual_seed(3)
    cached = model.generate(tokens(), **options)
    torch.manual_seed(3)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **options))


def test_quantized_cache_generates(model) -> None:
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    outputs = model.generate(tokens(), **GREEDY, **quantized, return_dict_in_generate=True, output_logits=True)
    assert type(outputs.cache).__name__ == "QuantizedCache"
    got = torch.stack(outputs.logits, 1).softmax(-1)
    dense = tiny_model(layer_types=["full_attention"] * 2)
    sparse_error, dense_error = (
        (other(outputs.sequences).logits[:, LENGTH - 1 : -1].softmax(-1) - got).abs().sum(-1).mean()
        for other in (model, dense)
    )
    assert 0 < sparse_error < 0.5 * dense_error


def test_batch_with_left_padding_equals_single_prompts(model) -> None:
    prompts = [tokens(1, length) for length in (LENGTH, 70, 1, 113)]
    longest = max(prompt.shape[1] for prompt in prompts)
    batch = torch.cat([torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
    for cache in ("dynamic", "static"):
        options = {**GREEDY, "cache_implementation": cache}
        together = model.generate(batch, attention_mask=(batch != 0).long(), **options)
        for row, prompt in zip(together, prompts, strict=True):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert torch.equal(row[longest:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_continuing_from_a_cache(model, kind: str) -> None:
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=300)
    first = model.generate(tokens(), cache=cache, **GREEDY)
    longer = torch.cat([first, tokens(2, 30)], 1)
    again = model.generate(longer, cache=cache, **GREEDY)
    assert torch.equal(again, greedy_without_cache(model, longer))


def test_pipeline_with_strings_messages_and_streaming(model, tokenizer, paragraphs) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    prompts = [paragraphs[0][:900], paragraphs[1][:300]]
    assert len(tokenizer(prompts[0])["input_ids"]) > LENGTH
    single = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    batched = [output[0]["generated_text"] for output in generator(prompts, batch_size=2, **options)]
    assert batched == single
    assert all(single)

    messages = [{"role": "user", "content": paragraphs[2][:900]}]
    reply = generator(messages, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert reply[:1] == messages
    assert reply[1]["role"] == "assistant"

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    whole = model.generate(ids, streamer=streamer, max_new_tokens=8, do_sample=False)
    assert "".join(streamer).strip() == tokenizer.decode(whole[0, ids.shape[1] :]).strip()
