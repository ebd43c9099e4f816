"""Metrics of the repetition and variety of text: pure functions of token ids, of text, or of features.

Legend: `T` tokens, `N` copies, `M` texts, `D` features.

The ids of one text are a list, a one-dimensional integer tensor, or an array. The ids of several texts are a list of
these, or a matrix. Cut off prompt, end-of-text token and padding first, because padding would count as a loop. Compare
texts of equal length, and compare with human text: to repeat less than people do is as wrong as to repeat more.
"""

import gzip
import importlib
import math
import operator
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from types import ModuleType

import numpy as np
from torch import Tensor

__all__ = [
    "compression_ratio",
    "distinct",
    "diversity",
    "expectation_adjusted_distinct",
    "loop_continuation_probability",
    "looping_share",
    "mauve",
    "ngram_entropy",
    "self_bleu",
    "sequence_repetition",
    "token_repetition",
]

Ids = Sequence[int] | Tensor | np.ndarray


def sequence_repetition(sequences: Iterable[Ids], n: int = 4) -> float:
    """Compute seq-rep-n: the mean over sequences of `1 - |distinct n-grams| / |n-grams|`.

    Welleck et al. 2019, https://arxiv.org/abs/1908.04319.

    Args:
        sequences: the ids of each continuation. Sequences shorter than `n` tokens have no n-gram and are left out.
        n (`int`): number of tokens of an n-gram.

    Returns:
        ratio in [0, 1); 0 if no n-gram occurs twice in its sequence.

    Raises:
        ValueError: `n < 1`, values that are not token ids, or no sequence of `n` tokens.
    """
    shares = [1 - len(set(grams)) / len(grams) for grams in _ngrams(sequences, n)]
    return math.fsum(shares) / len(shares)


def token_repetition(sequences: Iterable[Ids], predictions: Iterable[Ids], window: int = 128) -> tuple[float, float]:
    """Compute rep/l and wrep/l: the share of next-token predictions that repeat one of the last `l` tokens.

    With the prediction `g_t = argmax p(. | x_<t)`:

        rep/l  = mean over t of [g_t in x_{t-l}..x_{t-1}]
        wrep/l = mean over t of [g_t in x_{t-l}..x_{t-1} and g_t != x_t]

    The means are over the tokens of all sequences together. Welleck et al. 2019, https://arxiv.org/abs/1908.04319, who
    average the values for `l` = 16, 32, 128 and 512.

    Args:
        sequences: the ids of each real text. A text of fewer than two tokens has no prediction and does not count.
        predictions: for each text of `T` ids the `T - 1` most likely next tokens, `logits.argmax(-1)[:-1]`.
        window (`int`): `l`, in tokens.

    Returns:
        rep/l and wrep/l, ratios in [0, 1].

    Raises:
        ValueError: `window < 1`, values that are not token ids, predictions of other lengths, or no prediction.
    """
    _at_least("window", window, 1)
    texts = _sequences(sequences)
    guesses = _sequences(predictions)
    needed = [max(len(ids) - 1, 0) for ids in texts]
    given = [len(guessed) for guessed in guesses]
    if needed != given or not sum(needed):
        lengths = f"{reprlib.repr(needed)} (not all 0), got {reprlib.repr(given)}"
        raise ValueError(f"expected predictions of lengths {lengths}; logits.argmax(-1)[:-1] predicts one text")
    repeats = 0
    wrong = 0
    for ids, guessed in zip(texts, guesses, strict=True):
        last_seen: dict[int, int] = {}
        for place, guess in enumerate(guessed):
            last_seen[ids[place]] = place
            repeated = place - last_seen.get(guess, -window) < window
            repeats += repeated
            wrong += repeated and guess != ids[place + 1]
    return repeats / sum(needed), wrong / sum(needed)


def diversity(sequences: Iterable[Ids]) -> float:
    """Compute the product over n = 2, 3, 4 of `1 - rep-n`, where `rep-n = 1 - |distinct n-grams| / |n-grams|`.

    Su et al. 2022 (SimCTG), https://arxiv.org/abs/2202.06417. As in their evaluation, n-grams are distinct *within* a
    sequence, and both counts are sums over sequences. Unlike in their code, the last n-gram of a sequence counts.

    Args:
        sequences: the ids of each continuation. Sequences shorter than 4 tokens are left out.

    Returns:
        ratio in (0, 1]; 1 without any repetition.

    Raises:
        ValueError: values that are not token ids, or no sequence of 4 tokens.
    """
    kept = _sequences(sequences, 4)
    grams = [_ngrams(kept, n) for n in (2, 3, 4)]
    return math.prod(sum(len(set(one)) for one in each) / sum(map(len, each)) for each in grams)


def distinct(sequences: Iterable[Ids], n: int = 2) -> float:
    """Compute distinct-n: `|distinct n-grams| / |n-grams|` over all sequences together.

    Li et al. 2016, https://arxiv.org/abs/1510.03055, who divide by the number of tokens instead.

    Args:
        sequences: the ids of each continuation. Sequences shorter than `n` tokens are left out.
        n (`int`): number of tokens of an n-gram.

    Returns:
        ratio in (0, 1]; 1 if no n-gram occurs twice. More text lowers it.

    Raises:
        ValueError: `n < 1`, values that are not token ids, or no sequence of `n` tokens.
    """
    counts = Counter(chain.from_iterable(_ngrams(sequences, n)))
    return len(counts) / counts.total()


def expectation_adjusted_distinct(sequences: Iterable[Ids], vocabulary_size: int) -> float:
    """Compute EAD, the expectation-adjusted distinct-1: `D / (V (1 - (1 - 1/V)^C))` for `D` distinct of `C` tokens.

    The denominator is the expected number of distinct tokens among `C` random ones. Liu et al. 2022,
    https://arxiv.org/abs/2202.13587.

    Args:
        sequences: the ids of each continuation. Empty sequences are left out.
        vocabulary_size (`int`): `V`. Compare only values for the same `V`.

    Returns:
        ratio above 0: about 1 for random tokens, less for text, always below 1.59.

    Raises:
        ValueError: a token outside the vocabulary, values that are not token ids, or no token.
    """
    counts = Counter(chain.from_iterable(_ngrams(sequences, 1)))
    if max(counts) >= (vocabulary_size,):
        raise ValueError(
            f"vocabulary_size must exceed every id, got {vocabulary_size} and the id {max(counts)[0]}; pass the size "
            "of the tokenizer's vocabulary"
        )
    return len(counts) / (vocabulary_size * (1 - (1 - 1 / vocabulary_size) ** counts.total()))


def ngram_entropy(sequences: Iterable[Ids], n: int = 4) -> float:
    """Compute Ent-n, the entropy of n-grams: `-sum_w p(w) log p(w)`, where `p(w)` is the share of the n-gram `w`.

    The shares are over all sequences together. Zhang et al. 2018, https://arxiv.org/abs/1809.05972.

    Args:
        sequences: the ids of each continuation. Sequences shorter than `n` tokens are left out.
        n (`int`): number of tokens of an n-gram.

    Returns:
        entropy in nats: 0 if all n-grams are equal, and the logarithm of their number if all are distinct.

    Raises:
        ValueError: `n < 1`, values that are not token ids, or no sequence of `n` tokens.
    """
    counts = Counter(chain.from_iterable(_ngrams(sequences, n)))
    total = counts.total()
    return math.fsum(count / total * math.log(total / count) for count in counts.values())


def looping_share(sequences: Iterable[Ids], copies: int = 3, longest: int = 64) -> float:
    """Compute the looping share, or CREP: the share of outputs that end in several copies of one phrase.

    An output loops if its last `copies * p` tokens have a period `p <= longest`. The phrase may start anywhere in its
    cycle. This rule is the project's own; papers have other rules. Its defaults:

    - Three copies. In prose (1.8 million tokens of novels and the Bible), 0.017 % of the places come after two copies
      of a phrase, and 0.001 % after three. In source code 2.7 % come after three, because of rulers and tables.
    - A phrase of up to 64 tokens, which is a long sentence.

    Args:
        sequences: the ids of each output. An output shorter than `copies` tokens counts as one that does not loop.
        copies (`int`): number of copies that make a loop.
        longest (`int`): number of tokens of the longest phrase.

    Returns:
        ratio in [0, 1].

    Raises:
        ValueError: `copies < 2`, `longest < 1`, values that are not token ids, or no output.
    """
    _at_least("copies", copies, 2)
    _at_least("longest", longest, 1)
    loops = []
    for ids in _sequences(sequences):
        periods = range(1, min(longest, len(ids) // copies) + 1)
        loops.append(any(ids[-copies * p : -p] == ids[p - copies * p :] for p in periods))
    return sum(loops) / len(loops)


def loop_continuation_probability(log_probabilities: Tensor, length: int) -> Tensor:
    """Compute TP, the mean token probability of a sentence in each of its `N` copies.

    The values rise from copy to copy in a model that reinforces its own loops. Xu et al. 2022 (DITTO),
    https://arxiv.org/abs/2206.02369.

    Args:
        log_probabilities (`[..., T]`, floating, nats): the log-probability of each token of the copies, given all
            tokens before it. For `ids`, `[..., 1 + T]`, which hold a start token and the copies, this is
            `logits[..., :-1, :].log_softmax(-1).gather(-1, ids[..., 1:, None])[..., 0]`.
        length (`int`): number of tokens of the sentence; `T = N * length`.

    Returns:
        `[N]`, float64, in [0, 1]: the mean over the tokens of each copy and over all rows.

    Raises:
        ValueError: values that are not floating, do not make up complete copies, or are positive or NaN.
    """
    shape = list(log_probabilities.shape)
    dtype = log_probabilities.dtype
    if length < 1 or not dtype.is_floating_point or not log_probabilities.numel() or not shape or shape[-1] % length:
        raise ValueError(f"log_probabilities must be floating, [..., N * length], got {dtype} {shape} and {length=}")
    if not (log_probabilities <= 1e-2).all():  # rounding may exceed 0 in low precision; NaN compares as false
        raise ValueError(f"log_probabilities must be log_softmax of logits, got {log_probabilities.max().item()} > 0")
    return log_probabilities.double().exp().clamp(max=1).reshape(-1, shape[-1] // length, length).mean((0, 2))


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
    """Compute self-BLEU-n: the mean BLEU of each text with all other texts as references.

    It is high if the texts resemble each other. Zhu et al. 2018 (Texygen), https://arxiv.org/abs/1802.01886, here with
    sacrebleu's tokenization and smoothing.

    Args:
        texts: two texts or more; blank texts are left out. Compare equal numbers of texts, because the value rises with
            their number. The running time grows with its square.
        n (`int`): number of tokens of the longest n-gram.

    Returns:
        ratio in [0, 1].

    Raises:
        ValueError: `n < 1`, values that are not text, or fewer than two texts that are not blank.
        ImportError: sacrebleu is not installed.
    """
    _at_least("n", n, 1)
    kept = _texts(texts, 2)
    bleu = _optional("sacrebleu", "sacrebleu").BLEU(max_ngram_order=n, effective_order=True)
    scores = [bleu.sentence_score(text, kept[:i] + kept[i + 1 :]).score for i, text in enumerate(kept)]
    return min(math.fsum(scores) / len(scores) / 100, 1.0)  # for equal texts, rounding may exceed 1


def compression_ratio(texts: Sequence[str]) -> float:
    """Compute the compression ratio of texts, joined by spaces: `bytes of the text / bytes of its gzip`.

    Shaib et al. 2024, https://arxiv.org/abs/2403.00553.

    Args:
        texts: one text or more; blank texts are left out. gzip does not find repetitions more than 32 KiB apart.

    Returns:
        ratio above 0: below 1 for a few words, because gzip adds a header; 2 to 3 for long prose; up to 1000 for loops.

    Raises:
        ValueError: values that are not text, or only blank texts.
    """
    joined = " ".join(_texts(texts, 1)).encode()
    return len(joined) / len(gzip.compress(joined, mtime=0))


def mauve(features: Tensor | np.ndarray, human_features: Tensor | np.ndarray, seed: int = 25) -> float:
    """Compute MAUVE, the similarity of two sets of texts: the area under the curve of their divergences.

    The sets are compared as histograms over clusters of features, found by k-means. Pillutla et al. 2021,
    https://arxiv.org/abs/2102.01454. The package `mauve-text` computes it, with its scaling factor of 5 and one cluster
    per ten texts of the smaller set. Compare only values for the same feature model and the same numbers of texts. The
    authors advise a few thousand texts.

    Args:
        features (`[M, D]`, any float): a feature vector of each text of the evaluated model, such as the last hidden
            state of a large language model.
        human_features (`[M', D]`, any float): the features of human texts, from the same large model.
        seed (`int`): the seed of k-means.

    Returns:
        ratio in (0, 1]; 1 if both sets have the same histogram.

    Raises:
        ValueError: features that are not two finite matrices of equal width with two rows or more.
        ImportError: mauve-text is not installed.
    """
    given = [f.detach().float().cpu() if isinstance(f, Tensor) else f for f in (features, human_features)]
    model, human = (np.asarray(f, dtype=np.float32) for f in given)
    finite = bool(np.isfinite(model).all() and np.isfinite(human).all())
    if model.ndim != 2 or model.shape[1:] != human.shape[1:] or min(len(model), len(human)) < 2 or not finite:
        raise ValueError(f"features must be two [2 or more, D], finite, got {model.shape}, {human.shape}, {finite=}")
    return float(_optional("mauve", "mauve-text").compute_mauve(model, human, seed=seed).mauve)


def _sequences(sequences: Iterable[Ids], shortest: int = 0) -> list[list[int]]:
    """Return the sequences of at least `shortest` tokens as lists; raise a `ValueError` if all are shorter."""
    every = [_ids(sequence, number) for number, sequence in enumerate(sequences)]
    kept = [ids for ids in every if len(ids) >= shortest]
    if not kept:
        raise ValueError(f"expected sequences of at least {shortest} tokens, got {reprlib.repr([*map(len, every)])}")
    return kept


def _ids(sequence: Ids, number: int) -> list[int]:
    """Return one sequence as a list of ints; `number` is its place, for the error message."""
    try:
        ids = [operator.index(token) for token in (sequence.tolist() if hasattr(sequence, "tolist") else sequence)]
    except TypeError as error:
        raise ValueError(f"row {number} must be token ids, got {reprlib.repr(sequence)}; list a single row") from error
    if min(ids, default=0) < 0:
        raise ValueError(f"token ids must not be negative, got {min(ids)} in row {number}; cut off masked tokens")
    return ids


def _ngrams(sequences: Iterable[Ids], n: int) -> list[list[tuple[int, ...]]]:
    """Return the n-grams of each sequence of at least `n` tokens."""
    _at_least("n", n, 1)
    return [list(zip(*(ids[i:] for i in range(n)), strict=False)) for ids in _sequences(sequences, n)]


def _texts(texts: Sequence[str], fewest: int) -> list[str]:
    """Return the texts that are not blank; raise a `ValueError` if there are fewer than `fewest`."""
    kept = [] if isinstance(texts, str) else [text for text in texts if not isinstance(text, str) or text.strip()]
    if len(kept) < fewest or not all(isinstance(text, str) for text in kept):
        raise ValueError(f"expected a list of {fewest} or more texts that are not blank, got {reprlib.repr(texts)}")
    return kept


def _at_least(name: str, value: int, least: int) -> None:
    """Raise a `ValueError` if the value of an argument is below its minimum."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _optional(module: str, package: str) -> ModuleType:
    """Import the package of a single metric, or raise an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this metric needs {package} ({error}); install it with: pip install {package}") from error
