"""Pack documents into rows of a fixed number of tokens, so that documents do not attend to each other.

Positions restart at each document, which is how a model without attention mask recognizes documents. The first token of
a document is not predicted. A document that does not fit into a row continues in the next row as a new document.

Legend: `T` tokens of a row.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..model.labels import IGNORED

Row = dict[str, Tensor]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str | None]) -> list[list[int]]:
    """Tokenize texts, and end each one with the tokenizer's end-of-text token, if it has such a token.

    Args:
        texts: the texts; a text that is empty or `None` has no tokens.

    Returns:
        the token ids of each text.
    """
    texts = [text or "" for text in texts]
    end = tokenizer.eos_token_id
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    ended = [row if end is None or row[-1:] == [end] else [*row, end] for row in rows]
    return [row if text else [] for text, row in zip(texts, ended, strict=True)]


def pack(documents: Iterable[list[int]], row_tokens: int, used: int = 0) -> Iterator[tuple[list[list[int]], int]]:
    """Cut documents into the pieces of rows; only the last row may be shorter than `row_tokens`.

    Args:
        documents: the token ids of each document.
        row_tokens: number of tokens of a row.
        used: number of tokens of the first document to leave out.

    Yields:
        the pieces of a row, and how many tokens of its last document are used up by this row and earlier rows.
    """
    pieces: list[list[int]] = []
    room = row_tokens
    for tokens in documents:
        while used < len(tokens):
            piece = tokens[used : used + room]
            pieces.append(piece)
            used += len(piece)
            room -= len(piece)
            if not room:
                yield pieces, used
                pieces = []
                room = row_tokens
        used = 0
    if pieces:
        yield pieces, used


def make_row(pieces: list[list[int]]) -> Row:
    """Join pieces of documents into a row.

    Args:
        pieces: the token ids of each piece.

    Returns:
        `input_ids`, `position_ids` and `labels`, `[T]` each, int64. Positions restart at each piece, and the first
        token of a piece has the label -100.
    """
    input_ids = torch.tensor([token for piece in pieces for token in piece])
    position_ids = torch.cat([torch.arange(len(piece)) for piece in pieces])
    labels = input_ids.masked_fill(position_ids == 0, IGNORED)  # the token before belongs to another document
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def packed_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, row_tokens: int) -> list[Row]:
    """Pack texts into a list of rows, such as for evaluation.

    Args:
        texts: the texts.
        tokenizer (`PreTrainedTokenizerBase`): it adds its special tokens, and its end-of-text token ends each text.
        row_tokens (`int`): `T`, the number of tokens of a row.

    Returns:
        rows of `input_ids`, `position_ids` and `labels`, `[T]` each, int64. The rest of the last row is filled with a
        document without labels.

    Raises:
        ValueError: no text, or only empty texts.
    """
    rows = [pieces for pieces, _ in pack(encode(tokenizer, texts), row_tokens)]
    if not rows:
        raise ValueError("there must be text to pack, got no text or empty texts; check the data set and its column")
    filling = row_tokens - sum(map(len, rows[-1]))
    if not filling:
        return [make_row(pieces) for pieces in rows]
    last = make_row([*rows[-1], [tokenizer.eos_token_id or 0] * filling])
    last["labels"][-filling:] = IGNORED
    return [*(make_row(pieces) for pieces in rows[:-1]), last]
