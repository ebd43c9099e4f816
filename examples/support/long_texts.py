"""Long texts to measure on: works, their losses token by token, and facts hidden in them.

Legend: `T` tokens.
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
PROGRAM = (tarfile, inspect)  # of the standard library
PART = 256  # tokens whose logits exist at once
ROOM = 256  # tokens of a text left to facts and questions
NAMES = ("Anna", "Boris", "Clara", "David", "Elena")


def read_works(tokenizer: Any, paths: Sequence[Path] = ()) -> dict[str, Tensor]:
    """Return the token ids of works by name, `[T]` int64: of files, or else of a novel and of program text."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    if not texts:
        texts = {"novel": BOOK.read_text(encoding="utf-8"), "program": "".join(map(inspect.getsource, PROGRAM))}
    encoded = {name: tokenizer(text, add_special_tokens=False, verbose=False) for name, text in texts.items()}
    return {name: torch.tensor(ids["input_ids"]) for name, ids in encoded.items()}


def read(tokenizer: Any, paths: Sequence[Path], length: int) -> dict[str, Tensor]:
    """Return the first tokens of works."""
    works = {name: ids[:length] for name, ids in read_works(tokenizer, paths).items()}
    for name, ids in works.items():
        if len(ids) < length:
            raise SystemExit(f"the text {name} must have {length} tokens, got {len(ids)}; name a longer one")
    return works


def read_through(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Return the last hidden states, `[T, D]`, the ids on the model's device, and the head."""
    ids = ids.to(model.device)
    return model.get_decoder()(ids[None], use_cache=False).last_hidden_state[0], ids, model.get_output_embeddings()


@torch.no_grad()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each token but the first, `[T - 1]`."""
    states, ids, head = read_through(model, ids)
    parts = zip(states[:-1].split(PART), ids[1:].split(PART), strict=True)
    return torch.cat([cross_entropy(head(part).float(), wanted, reduction="none") for part, wanted in parts])


@dataclass(frozen=True)
class Fact:
    """A text that is hidden at some depth of another, in [0, 1], and the question that its key answers."""

    depth: float
    text: str
    question: str
    key: int


def pass_key(depth: float, seed: int) -> Fact:
    """Return a pass key, in the words of Landmark Attention (https://arxiv.org/abs/2305.16300)."""
    (key,) = _numbers(1, seed)
    text = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Fact(depth, text, "What is the pass key? The pass key is", key)


def facts(depths: Sequence[float], seed: int, names: Sequence[str] = NAMES) -> list[Fact]:
    """Return a key number of a name for each depth."""
    told = zip(depths, names, _numbers(len(depths), seed), strict=False)
    return [
        Fact(d, f"The pass key of {n} is {key}. Remember it.", f"The pass key of {n} is", key) for d, n, key in told
    ]


def _numbers(count: int, seed: int) -> list[int]:
    return torch.randint(10000, 100000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def hide(tokenizer: Any, prose: Tensor, hidden: Sequence[Fact]) -> tuple[Tensor, list[slice]]:
    """Hide facts in a text, in increasing depth, and ask for all of them after it, in another order.

    Returns:
        token ids, and where the answers are.
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
    """Return for each answer which of its tokens are the likeliest, given those before."""
    states, ids, head = read_through(model, ids)
    return [head(states[a.start - 1 : a.stop - 1]).argmax(-1) == ids[a] for a in answers]


def share_found(found: list[Tensor]) -> float:
    """Return the share of tokens, in [0, 1]."""
    return torch.cat(found).float().mean().item()
