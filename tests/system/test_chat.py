"""Conversations in this process: pipelines, caches, streaming, and chat templates that stay with their checkpoint."""

from threading import Thread

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from whisper_hf import WhisperLMForCausalLM, convert_checkpoint
from whisper_hf.quantization.quantized_checkpoint import quantize

from ..conftest import LENGTH, SIZES, SPARSE, tiny_model
from ..model.test_generation import greedy_without_cache

NEW = 12
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def model() -> WhisperLMForCausalLM:
    """A tiny sparse model that takes long conversations."""
    return tiny_model(max_position_embeddings=2048)


@pytest.fixture
def chat(model, tokenizer):
    """A pipeline, for messages."""
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def conversation_ids(tokenizer, messages: list[dict]) -> torch.Tensor:
    """Return `[1, T]`, the conversation as the model reads it."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]


def reply_without_cache(model, tokenizer, messages: list[dict]) -> str:
    """Return the greedy reply, each token of which comes from a full forward pass."""
    ids = conversation_ids(tokenizer, messages)
    assert ids.shape[1] > LENGTH  # several times the budget
    whole = greedy_without_cache(model, ids, NEW)
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("reuse", [False, True], ids=["new cache", "one cache"])
def test_several_turns_equal_the_whole_conversation(reuse: bool, chat, model, tokenizer, paragraphs) -> None:
    """One cache serves all turns if it is cropped to what the next turn has in common with it."""
    cache, held = DynamicCache(config=model.config), torch.empty(1, 0, dtype=torch.long)
    messages: list[dict] = []
    for question in (paragraphs[0][:600], paragraphs[1][:300], "And then?"):
        messages.append({"role": "user", "content": question})
        options = {**GREEDY}
        if reuse:
            ids = conversation_ids(tokenizer, messages)
            shared = min(held.shape[1], ids.shape[1] - 1)
            same = (held[0, :shared] == ids[0, :shared]).long().cumprod(0).sum().item()
            assert same > LENGTH or not held.numel()
            cache.crop(same - held.shape[1])
            options["cache"] = cache
        said = chat(messages, **options)[0]["generated_text"]
        assert said[:-1] == messages
        assert said[-1] == {"role": "assistant", "content": reply_without_cache(model, tokenizer, messages)}
        if reuse:  # the last token of the reply has not been read yet
            assert cache.get_seq_length() == ids.shape[1] + NEW - 1
            held = greedy_without_cache(model, ids, NEW)[:, :-1]
        messages = said


def test_many_conversations_equal_single_ones(chat, paragraphs) -> None:
    cuts = [(0, 900), (1, 200), (2, 1400)]
    conversations = [[{"role": "user", "content": paragraphs[i][:length]}] for i, length in cuts]
    together = chat(conversations, batch_size=3, **GREEDY)
    alone = [chat(messages, **GREEDY) for messages in conversations]
    assert together == alone
    assert len({str(outputs[0]["generated_text"][-1]) for outputs in alone}) > 1


def test_streams_equal_the_reply(chat, model, tokenizer, paragraphs, capsys) -> None:
    messages = [{"role": "user", "content": paragraphs[3][:900]}]
    expected = reply_without_cache(model, tokenizer, messages)
    chat(messages, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **GREEDY)
    assert capsys.readouterr().out.strip() == expected

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=chat, args=(messages,), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces).strip() == expected
    assert len(pieces) > 1


@pytest.mark.parametrize("way", ["converted", "and quantized"])
def test_a_checkpoint_keeps_its_template(way: str, tokenizer, paragraphs, tmp_path) -> None:
    """A dense chat model, converted or also quantized by our commands, chats from its folder alone."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, max_position_embeddings=2048))
    for saved in (dense, tokenizer):
        saved.save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "converted", SPARSE)
    if way == "and quantized":
        quantize(tmp_path / "converted", tmp_path / way, "int8-cpu", text=None)
    chat = pipeline("text-generation", model=str(tmp_path / way))
    assert type(chat.model) is WhisperLMForCausalLM
    carried = AutoTokenizer.from_pretrained(tmp_path / way)
    assert carried.chat_template == tokenizer.chat_template
    messages = [{"role": "user", "content": paragraphs[4][:900]}]
    reply = chat(messages, **GREEDY)[0]["generated_text"][-1]
    assert reply == {"role": "assistant", "content": reply_without_cache(chat.model, carried, messages)}
