"""Long texts to measure models on: their losses token by token, and facts hidden in them that a model must find.

Legend: `T` tokens, `D` width of the hidden states.
"""

import inspect
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

BOOK = Path(__file__).parents[1] / "data" / "northanger_abbey.txt"
PROGRAM = (tarfile, inspect)  # modules of the standard library, whose source code serves as text
PART = 256  # tokens whose logits are in memory at once
ROOM = 256  # tokens of a text reserved for facts and questions
NAMES = ("Anna", "Boris", "Clara", "David", "Elena")


def read_works(tokenizer: Any, paths: Sequence[Path] = ()) -> dict[str, Tensor]:
    """Return the token ids of texts by name, `[T]` int64: of the files, or by default of a novel and of source code."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    if not texts:
        texts = {"novel": BOOK.read_text(encoding="utf-8"), "program": "".join(map(inspect.getsource, PROGRAM))}
    encoded = {name: tokenizer(text, add_special_tokens=False, verbose=False) for name, text in texts.items()}
    return {name: torch.tensor(ids["input_ids"]) for name, ids in encoded.items()}


def read(tokenizer: Any, paths: Sequence[Path], length: int) -> dict[str, Tensor]:
    """Return the first `length` tokens of texts by name, `[length]` int64; a shorter text ends the script."""
    works = {name: ids[:length] for name, ids in read_works(tokenizer, paths).items()}
    for name, ids in works.items():
        if len(ids) < length:
            raise SystemExit(f"the text {name} must have {length} tokens, got {len(ids)}; name a longer one")
    return works


def read_through(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Run the model on token ids `[T]`; return its last hidden states `[T, D]`, the ids on its device, and its head."""
    ids = ids.to(model.device)
    return model.get_decoder()(ids[None], use_cache=False).last_hidden_state[0], ids, model.get_output_embeddings()


@torch.no_grad()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each token of `ids`, `[T]` int64, but the first: `[T - 1]` float32."""
    states, ids, head = read_through(model, ids)
    parts = zip(states[:-1].split(PART), ids[1:].split(PART), strict=True)
    return torch.cat([cross_entropy(head(part).float(), wanted, reduction="none") for part, wanted in parts])


@dataclass(frozen=True)
class Fact:
    """A fact to hide in a text, and the question that asks for it.

    Args:
        depth: where in the text to hide it, from 0 (beginning) to 1 (end).
        text: the sentences that state the fact.
        question: the beginning of a sentence that the key completes.
        key: a number of five digits.
    """

    depth: float
    text: str
    question: str
    key: int


def pass_key(depth: float, seed: int) -> Fact:
    """Make a fact with a random pass key, in the words of Landmark Attention (https://arxiv.org/abs/2305.16300)."""
    (key,) = _numbers(1, seed)
    text = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Fact(depth, text, "What is the pass key? The pass key is", key)


def facts(depths: Sequence[float], seed: int, names: Sequence[str] = NAMES) -> list[Fact]:
    """Make a fact for each depth: the random pass key of a person."""
    return [
        Fact(depth, f"The pass key of {name} is {key}. Remember it.", f"The pass key of {name} is", key)
        for depth, name, key in zip(depths, names, _numbers(len(depths), seed), strict=False)
    ]


def _numbers(count: int, seed: int) -> list[int]:
    """Return random numbers of five digits."""
    return torch.randint(10000, 100000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def hide(tokenizer: Any, prose: Tensor, hidden: Sequence[Fact]) -> tuple[Tensor, list[slice]]:
    """Hide facts in a text, and add questions and answers about all of them at its end, in another order.

    Args:
        tokenizer: the model's tokenizer.
        prose: `[T]` int64, the tokens of the text.
        hidden: facts, at most five, in increasing depth.

    Returns:
        token ids of the whole, `[T']` int64, and for each question the slice of its answer.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    ids: list[int] = []
    bounds = [0, *(int(fact.depth * len(prose)) for fact in hidden), len(prose)]
    for index, (start, stop) in enumerate(pairwise(bounds)):
        ids += prose[start:stop].tolist()
        if index < len(hidden):
            ids += encode(f"\n\n{hidden[index].text}\n\n")
    answers = []
    for index in sorted(range(len(hidden)), key=lambda i: (i * 3) % 5):
        ids += encode(f"\n\n{hidden[index].question}")
        answer = encode(f" {hidden[index].key}")
        answers.append(slice(len(ids), len(ids) + len(answer)))
        ids += answer + encode(".")
    return torch.tensor(ids), answers


@torch.no_grad()
def tokens_found(model: Any, ids: Tensor, answers: list[slice]) -> list[Tensor]:
    """Return for each answer which of its tokens the model predicts, given all tokens before: `[tokens]` bool.

    Args:
        model: a causal language model.
        ids: `[T]` int64, the text with its answers.
        answers: where the answers are.
    """
    states, ids, head = read_through(model, ids)
    # the state of a token predicts the token after it
    before = [slice(answer.start - 1, answer.stop - 1) for answer in answers]
    return [head(states[b]).argmax(-1) == ids[answer] for b, answer in zip(before, answers, strict=True)]


def share_found(found: list[Tensor]) -> float:
    """Return the share of the answers' tokens that were predicted, in [0, 1]."""
    return torch.cat(found).float().mean().item()
