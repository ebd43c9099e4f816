"""Tiny models and texts that the tests share: sequences are always several times longer than the sparse budget."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed

from whisper_hf import WhisperLMConfig, WhisperLMForCausalLM

torch.set_num_threads(1)  # on tensors this small, threads only wait for one another

ROOT = Path(__file__).parents[1]
SPARSE = {"block_size": 16, "topk_blocks": 1, "local_blocks": 1, "sink_blocks": 1}  # 48 tokens
LENGTH = 160  # more than three times that
VOCABULARY = 120
SIZES = {  # of the dense and foreign models
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large enough for attention to be far from uniform
}


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    set_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exempt what has been imported from garbage collection, which each training of a Trainer asks for twice."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let the interpreter clear what was exempt before it exits."""
    gc.unfreeze()


def tiny_config(**overrides: object) -> WhisperLMConfig:
    """Return the config of a two-layer model with grouped queries and query-key norms."""
    values = {
        **SIZES,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "sparse_attention": SPARSE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return WhisperLMConfig(**{**values, **overrides})


def tiny_model(**overrides: object) -> WhisperLMForCausalLM:
    """Return a randomly initialised tiny model in evaluation mode."""
    set_seed(0)
    return WhisperLMForCausalLM(tiny_config(**overrides)).eval()


def tokens(batch_size: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Return random token ids `[batch_size, length]` without special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)


@pytest.fixture
def model() -> WhisperLMForCausalLM:
    """A tiny sparse model."""
    return tiny_model()


@pytest.fixture
def input_ids() -> torch.Tensor:
    """Two sequences several times longer than the budget."""
    return tokens()


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """Real paragraphs, long ones."""
    text = (ROOT / "examples" / "data" / "northanger_abbey.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if len(line) > 400][:64]


@pytest.fixture(scope="session")
def tokenizer(paragraphs: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of `VOCABULARY` tokens with a chat template, trained on the paragraphs."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    backend.train_from_iterator(paragraphs, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.padding_side = "left"
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return fast


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """Return a function that wraps `module.name` and the list to which each call's result is added."""

    def wrap(module: object, name: str) -> list:
        results: list = []
        original = getattr(module, name)

        def counted(*args: object, **kwargs: object) -> object:
            results.append(original(*args, **kwargs))
            return results[-1]

        monkeypatch.setattr(module, name, counted)
        return results

    return wrap
