"""Rows of a fixed number of tokens, made of documents that do not see each other.

Positions restart at each document, which is what tells the model (with no attention mask), and the first token of each
is not predicted. A document that does not fit goes on in the next row, as one of its own. `T` tokens of a row.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..model.labels import IGNORED

Row = dict[str, Tensor]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str | None]) -> list[list[int]]:
    """Return the token ids of each text, ended by the end-of-text token, if there is one; none of an empty text."""
    texts, end = [text or "" for text in texts], tokenizer.eos_token_id
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    ended = [row if end is None or row[-1:] == [end] else [*row, end] for row in rows]
    return [row if text else [] for text, row in zip(texts, ended, strict=True)]


def pack(documents: Iterable[list[int]], row_tokens: int, used: int = 0) -> Iterator[tuple[list[list[int]], int]]:
    """Cut documents into rows; only the last row may be shorter.

    Args:
        documents: token ids of each.
        row_tokens: tokens of a row.
        used: leave out so many tokens of the first document.

    Yields:
        The pieces that make up a row, and how many tokens of the last document they and those before have used.
    """
    pieces: list[list[int]] = []
    room = row_tokens
    for tokens in documents:
        while used < len(tokens):
            pieces.append(tokens[used : used + room])
            used, room = used + len(pieces[-1]), room - len(pieces[-1])
            if not room:
                yield pieces, used
                pieces, room = [], row_tokens
        used = 0
    if pieces:
        yield pieces, used


def make_row(pieces: list[list[int]]) -> Row:
    """Return `input_ids`, `position_ids` and `labels`, each `[T]`, int64, of documents that do not see each other."""
    input_ids = torch.tensor([token for piece in pieces for token in piece])
    position_ids = torch.cat([torch.arange(len(piece)) for piece in pieces])
    labels = input_ids.masked_fill(position_ids == 0, IGNORED)  # the token before is another document's
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def packed_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, row_tokens: int) -> list[Row]:
    """Pack some texts once, for evaluation; what is left of the last row is filled with a document without labels."""
    rows = [pieces for pieces, _ in pack(encode(tokenizer, texts), row_tokens)]
    if not rows:
        raise ValueError("there must be text to pack, got none")
    filling = row_tokens - sum(map(len, rows[-1]))
    if not filling:
        return [make_row(pieces) for pieces in rows]
    last = make_row([*rows[-1], [tokenizer.eos_token_id or 0] * filling])
    last["labels"][-filling:] = IGNORED
    return [*(make_row(pieces) for pieces in rows[:-1]), last]
