"""How much text repeats itself, and how much it varies: pure functions of token ids, of text, or of features.

Legend: `T` tokens, `N` copies, `M` texts, `D` features. Ids of one text are a list, a one-dimensional integer tensor or
an array; those of several are a list of these or a matrix. First cut off prompt, end-of-text token and padding, which
would count as a loop. Compare equally long texts, and with people's: to repeat less than they do is as wrong as more.
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
    """seq-rep-n: mean of `1 - |distinct n-grams| / |n-grams|`. Welleck et al. 2019, https://arxiv.org/abs/1908.04319.

    Args:
        sequences: ids of each continuation; those shorter than `n` tokens have no n-gram and are left out.
        n (`int`): tokens in an n-gram.
    Returns:
        ratio in [0, 1), 0 where no n-gram occurs twice in its sequence.
    Raises:
        ValueError: `n < 1`, something other than token ids, or no sequence of `n` tokens.
    """
    shares = [1 - len(set(grams)) / len(grams) for grams in _ngrams(sequences, n)]
    return math.fsum(shares) / len(shares)


def token_repetition(sequences: Iterable[Ids], predictions: Iterable[Ids], window: int = 128) -> tuple[float, float]:
    """rep/l and wrep/l: share of next-token predictions that occur in the `l` tokens before; and that are wrong, too.

    `mean over t of [g_t in x_{t-l}..x_{t-1}]` with `g_t = argmax p(. | x_<t)`, and of `[the same and g_t != x_t]`, all
    tokens together. Welleck et al. 2019, https://arxiv.org/abs/1908.04319: they average `l` of 16, 32, 128 and 512.

    Args:
        sequences: ids of real text; nothing is predicted in one of fewer than two tokens, so it does not count.
        predictions: for each sequence of `T` ids the `T - 1` most likely next tokens, `logits.argmax(-1)[:-1]`.
        window (`int`): `l`, tokens.
    Returns:
        rep/l and wrep/l, ratios in [0, 1] of all predictions.
    Raises:
        ValueError: `window < 1`, something other than token ids, predictions that do not fit, or none at all.
    """
    _at_least("window", window, 1)
    texts, guesses = _sequences(sequences), _sequences(predictions)
    needed, given = [max(len(ids) - 1, 0) for ids in texts], [len(guessed) for guessed in guesses]
    if needed != given or not sum(needed):
        lengths = f"{reprlib.repr(needed)} (not all 0), got {reprlib.repr(given)}"
        raise ValueError(f"expected predictions of lengths {lengths}; logits.argmax(-1)[:-1] are those of one text")
    repeats, wrong = 0, 0
    for ids, guessed in zip(texts, guesses, strict=True):
        last_seen: dict[int, int] = {}
        for place, guess in enumerate(guessed):
            last_seen[ids[place]] = place
            repeated = place - last_seen.get(guess, -window) < window
            repeats += repeated
            wrong += repeated and guess != ids[place + 1]
    return repeats / sum(needed), wrong / sum(needed)


def diversity(sequences: Iterable[Ids]) -> float:
    """Product over n = 2, 3, 4 of `1 - rep-n`, where `rep-n = 1 - |distinct n-grams| / |n-grams|`.

    Su et al. 2022 (SimCTG), https://arxiv.org/abs/2202.06417. As in their evaluation, n-grams are distinct *within* a
    sequence, and both counts are sums over sequences; unlike in their code, the last n-gram of a sequence counts.

    Args:
        sequences: ids of each continuation; those shorter than 4 tokens are left out.
    Returns:
        ratio in (0, 1], 1 without any repetition.
    Raises:
        ValueError: something other than token ids, or no sequence of 4 tokens.
    """
    kept = _sequences(sequences, 4)
    grams = [_ngrams(kept, n) for n in (2, 3, 4)]
    return math.prod(sum(len(set(one)) for one in each) / sum(map(len, each)) for each in grams)


def distinct(sequences: Iterable[Ids], n: int = 2) -> float:
    """distinct-n: `|distinct n-grams| / |n-grams|` of the corpus. Li et al. 2016, https://arxiv.org/abs/1510.03055.

    Args:
        sequences: ids of each continuation; those shorter than `n` tokens are left out.
        n (`int`): tokens in an n-gram.
    Returns:
        ratio in (0, 1], 1 where none occurs twice (not so in the paper, which divides by tokens). More text lowers it.
    Raises:
        ValueError: `n < 1`, something other than token ids, or no sequence of `n` tokens.
    """
    counts = Counter(chain.from_iterable(_ngrams(sequences, n)))
    return len(counts) / counts.total()


def expectation_adjusted_distinct(sequences: Iterable[Ids], vocabulary_size: int) -> float:
    """EAD: `N / (V (1 - (1 - 1/V)^C))`, `N` of `C` tokens distinct. Liu et al. 2022, https://arxiv.org/abs/2202.13587.

    Args:
        sequences: ids of each continuation; empty ones are left out.
        vocabulary_size (`int`): `V`, the same for all that are compared.
    Returns:
        ratio of distinct tokens to those expected of random ones: about 1 for these, less for text; below 1.59.
    Raises:
        ValueError: a token outside the vocabulary, something other than token ids, or no token.
    """
    counts = Counter(chain.from_iterable(_ngrams(sequences, 1)))
    if max(counts) >= (vocabulary_size,):
        raise ValueError(f"vocabulary_size must exceed every id, got {vocabulary_size} and the id {max(counts)[0]}")
    return len(counts) / (vocabulary_size * (1 - (1 - 1 / vocabulary_size) ** counts.total()))


def ngram_entropy(sequences: Iterable[Ids], n: int = 4) -> float:
    """Ent-n: `-sum p(w) log p(w)`, p the share of n-gram w. Zhang et al. 2018, https://arxiv.org/abs/1809.05972.

    Args:
        sequences: ids of each continuation; those shorter than `n` tokens are left out.
        n (`int`): tokens in an n-gram.
    Returns:
        nats, over all sequences together: 0 (one n-gram over and over) to the logarithm of their number (all distinct).
    Raises:
        ValueError: `n < 1`, something other than token ids, or no sequence of `n` tokens.
    """
    counts = Counter(chain.from_iterable(_ngrams(sequences, n)))
    total = counts.total()
    return math.fsum(count / total * math.log(total / count) for count in counts.values())


def looping_share(sequences: Iterable[Ids], copies: int = 3, longest: int = 64) -> float:
    """CREP: share of outputs that end in a loop: their last `copies * p` tokens have a period `p` of `longest` or less.

    They are `copies` repetitions of a phrase, which may start anywhere in its cycle. The rule is this project's; papers
    have others. Three copies, as 0.017 % of the places in prose (1.8 million tokens of novels and the Bible) follow
    two and 0.001 % three (source code: 2.7 %, rulers and tables). 64 tokens, as that is a long sentence.

    Args:
        sequences: ids of each output; those shorter than `copies` tokens count, as not looping.
        copies (`int`): repetitions that make a loop.
        longest (`int`): tokens in the longest phrase.
    Returns:
        ratio in [0, 1]; 1 for a single output that loops.
    Raises:
        ValueError: `copies < 2`, `longest < 1`, something other than token ids, or no output.
    """
    _at_least("copies", copies, 2)
    _at_least("longest", longest, 1)
    loops = []
    for ids in _sequences(sequences):
        periods = range(1, min(longest, len(ids) // copies) + 1)
        loops.append(any(ids[-copies * p : -p] == ids[p - copies * p :] for p in periods))
    return sum(loops) / len(loops)


def loop_continuation_probability(log_probabilities: Tensor, length: int) -> Tensor:
    """TP: mean probability of a sentence in each of `N` copies. Xu et al. 2022 (DITTO), https://arxiv.org/abs/2206.02369.

    Args:
        log_probabilities (`[..., T]`, floating, nats): of each token of the copies, given all before it. If `ids` are
            these after one to start with, `logits[..., :-1, :].log_softmax(-1).gather(-1, ids[..., 1:, None])[..., 0]`.
        length (`int`): tokens in the sentence; `T = N * length`.
    Returns:
        `[N]`, float64, in [0, 1]: of the tokens of each copy and of all rows. It rises in a model that likes its loops.
    Raises:
        ValueError: not floating, not whole copies, or positive or NaN and so no log-probabilities.
    """
    shape, dtype = list(log_probabilities.shape), log_probabilities.dtype
    if length < 1 or not dtype.is_floating_point or not log_probabilities.numel() or not shape or shape[-1] % length:
        raise ValueError(f"log_probabilities must be floating, [..., N * length], got {dtype} {shape} and {length=}")
    if not (log_probabilities <= 1e-2).all():  # low precision may round up; NaN compares false
        raise ValueError(f"log_probabilities must be log_softmax of logits, got {log_probabilities.max().item()} > 0")
    return log_probabilities.double().exp().clamp(max=1).reshape(-1, shape[-1] // length, length).mean((0, 2))


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
    """self-BLEU-n: BLEU of each text against all others as references, averaged; high if they resemble each other.

    Zhu et al. 2018 (Texygen), https://arxiv.org/abs/1802.01886, here with sacrebleu's tokenization and smoothing.

    Args:
        texts: two or more, blank ones left out. Compare equal numbers: it rises with that, and time with its square.
        n (`int`): tokens in the longest n-gram.
    Returns:
        ratio in [0, 1].
    Raises:
        ValueError: `n < 1`, something other than text, or fewer than two that are not blank.
        ImportError: sacrebleu is not installed.
    """
    _at_least("n", n, 1)
    kept = _texts(texts, 2)
    bleu = _optional("sacrebleu", "sacrebleu").BLEU(max_ngram_order=n, effective_order=True)
    scores = [bleu.sentence_score(text, kept[:i] + kept[i + 1 :]).score for i, text in enumerate(kept)]
    return min(math.fsum(scores) / len(scores) / 100, 1.0)  # equal texts round to a little more


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of the texts, joined by spaces, over those of their gzip. Shaib et al. 2024, https://arxiv.org/abs/2403.00553.

    Args:
        texts: one or more; blank ones are left out. What repeats after more than 32 KiB is not seen.
    Returns:
        ratio above 0: below 1 for a few words (there is a header), 2 to 3 for much prose, up to 1000 for loops.
    Raises:
        ValueError: something other than text, or none that is not blank.
    """
    joined = " ".join(_texts(texts, 1)).encode()
    return len(joined) / len(gzip.compress(joined, mtime=0))


def mauve(features: Tensor | np.ndarray, human_features: Tensor | np.ndarray, seed: int = 25) -> float:
    """MAUVE: area under the curve of divergences of two sets of texts, histograms over buckets made by k-means.

    Pillutla et al. 2021, https://arxiv.org/abs/2102.01454, by `mauve-text`, with its scale of 5 and a bucket for ten
    texts of the smaller set. Compare only at the same feature model and number of texts; they advise some thousand.

    Args:
        features (`[M, D]`): of each text of a model, such as the last hidden state of a large language model.
        human_features (`[M', D]`): of people's texts, by the same large model.
        seed (`int`): of k-means.
    Returns:
        ratio in (0, 1], 1 for sets that fill the buckets alike.
    Raises:
        ValueError: features that are not finite matrices of equal width, of two texts or more each.
        ImportError: mauve-text is not installed.
    """
    given = [f.detach().float().cpu() if isinstance(f, Tensor) else f for f in (features, human_features)]
    model, human = (np.asarray(f, dtype=np.float32) for f in given)
    finite = bool(np.isfinite(model).all() and np.isfinite(human).all())
    if model.ndim != 2 or model.shape[1:] != human.shape[1:] or min(len(model), len(human)) < 2 or not finite:
        raise ValueError(f"features must be two [2 or more, D], finite, got {model.shape}, {human.shape}, {finite=}")
    return float(_optional("mauve", "mauve-text").compute_mauve(model, human, seed=seed).mauve)


def _sequences(sequences: Iterable[Ids], shortest: int = 0) -> list[list[int]]:
    """Return the sequences of at least `shortest` tokens as lists."""
    every = [_ids(sequence, number) for number, sequence in enumerate(sequences)]
    kept = [ids for ids in every if len(ids) >= shortest]
    if not kept:
        raise ValueError(f"expected sequences of at least {shortest} tokens, got {reprlib.repr([*map(len, every)])}")
    return kept


def _ids(sequence: Ids, number: int) -> list[int]:
    """Return one sequence as a list of ints."""
    try:
        ids = [operator.index(token) for token in (sequence.tolist() if hasattr(sequence, "tolist") else sequence)]
    except TypeError as error:
        raise ValueError(f"row {number} must be token ids, got {reprlib.repr(sequence)}; list a single row") from error
    if min(ids, default=0) < 0:
        raise ValueError(f"token ids must not be negative, got {min(ids)} in row {number}; cut off what is masked")
    return ids


def _ngrams(sequences: Iterable[Ids], n: int) -> list[list[tuple[int, ...]]]:
    """Return the n-grams of each sequence that has any."""
    _at_least("n", n, 1)
    return [list(zip(*(ids[i:] for i in range(n)), strict=False)) for ids in _sequences(sequences, n)]


def _texts(texts: Sequence[str], fewest: int) -> list[str]:
    """Return the texts that are not blank."""
    kept = [] if isinstance(texts, str) else [text for text in texts if not isinstance(text, str) or text.strip()]
    if len(kept) < fewest or not all(isinstance(text, str) for text in kept):
        raise ValueError(f"expected a list of {fewest} or more texts that are not blank, got {reprlib.repr(texts)}")
    return kept


def _at_least(name: str, value: int, least: int) -> None:
    """Refuse too small a number."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _optional(module: str, package: str) -> ModuleType:
    """Import what one metric alone needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this metric needs {package} ({error}); install it with: pip install {package}") from error
