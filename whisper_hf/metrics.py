"""How much text repeats itself, and how much it varies: pure functions of token ids, of text, or of features.

Legend: `T` tokens, `N` copies, `M` texts, `D` features. Ids of one text are a list, a one-dimensional integer tensor or
a numpy array; those of several are a list of these or a matrix. First cut off the prompt, the end-of-text token and
all padding, which would count as a loop. Compare texts of the same number of tokens, as most values depend on it, and
set the value of human text beside that of a model: to repeat less than people do is as wrong as to repeat more.
"""

import gzip
import importlib
import math
import operator
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
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
Gram = tuple[int, ...]


def sequence_repetition(sequences: Iterable[Ids], n: int = 4) -> float:
    """seq-rep-n: `1 - |distinct n-grams| / |n-grams|` of each sequence, averaged over sequences.

    Welleck et al. 2019, https://arxiv.org/abs/1908.04319.

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

    `mean over t of [g_t in x_{t-l}..x_{t-1}]` for the guess `g_t = argmax p(. | x_<t)`, and of `[the same and g_t !=
    x_t]`, over all tokens together. Welleck et al. 2019, https://arxiv.org/abs/1908.04319 (they average over windows
    of 16, 32, 128 and 512).

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
        need = f"expected {reprlib.repr(needed)} predictions (each length less one, not all 0)"
        raise ValueError(f"{need}, got {reprlib.repr(given)}; logits.argmax(-1)[:-1] gives those of a sequence")
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

    Su et al. 2022 (SimCTG), https://arxiv.org/abs/2202.06417. As in their evaluation, distinct means *within* a
    sequence, and the counts are summed over sequences before they are divided, so that long ones weigh more than in
    [`sequence_repetition`]; unlike in their code, the last n-gram of a sequence counts.

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
    """distinct-n: `|distinct n-grams| / |n-grams|`, both of all sequences together.

    Li et al. 2016, https://arxiv.org/abs/1510.03055; they divide by the number of tokens. Dividing by that of n-grams,
    as is usual since, makes 1 mean that none occurs twice. It falls as the number of sequences grows.

    Args:
        sequences: ids of each continuation; those shorter than `n` tokens are left out.
        n (`int`): tokens in an n-gram.
    Returns:
        ratio in (0, 1].
    Raises:
        ValueError: `n < 1`, something other than token ids, or no sequence of `n` tokens.
    """
    counts = _counts(sequences, n)
    return len(counts) / counts.total()


def expectation_adjusted_distinct(sequences: Iterable[Ids], vocabulary_size: int) -> float:
    """EAD: `N / (V (1 - ((V - 1) / V)^C))`, the `N` distinct of `C` tokens, over those expected of `C` random ones.

    Liu et al. 2022, https://arxiv.org/abs/2202.13587: distinct-1 without its bias against long text.

    Args:
        sequences: ids of each continuation; empty ones are left out.
        vocabulary_size (`int`): `V`, the same for all that are compared.
    Returns:
        ratio, about 1 for uniformly random tokens, less for text; above 0 and at most `1 / (1 - 1/e)`, 1.58.
    Raises:
        ValueError: a token outside the vocabulary, something other than token ids, or no token.
    """
    counts = _counts(sequences, 1)
    if max(counts) >= (vocabulary_size,):
        raise ValueError(f"vocabulary_size must exceed every id, got {vocabulary_size} and the id {max(counts)[0]}")
    return len(counts) / (vocabulary_size * (1 - (1 - 1 / vocabulary_size) ** counts.total()))


def ngram_entropy(sequences: Iterable[Ids], n: int = 4) -> float:
    """Ent-n: `-sum_w F(w)/F log(F(w)/F)`, with `F(w)` the count of the n-gram `w` in all sequences, and `F` the sum.

    Zhang et al. 2018, https://arxiv.org/abs/1809.05972: unlike [`distinct`] it sees how often an n-gram repeats.

    Args:
        sequences: ids of each continuation; those shorter than `n` tokens are left out.
        n (`int`): tokens in an n-gram.
    Returns:
        nats, from 0 (one n-gram over and over) to the logarithm of the number of n-grams (all distinct).
    Raises:
        ValueError: `n < 1`, something other than token ids, or no sequence of `n` tokens.
    """
    counts = _counts(sequences, n)
    total = counts.total()
    return math.fsum(count / total * math.log(total / count) for count in counts.values())


def looping_share(sequences: Iterable[Ids], copies: int = 3, longest: int = 64) -> float:
    """CREP: share of outputs that end in a loop: their last `copies * p` tokens have a period `p` of `longest` or less.

    That is, in `copies` or more repetitions of a phrase of `p` tokens, the last of which may be cut off. The rule is
    this project's: papers have others. Three copies, as in English prose (5 novels and the Bible, 1.8 million tokens)
    0.017 % of the places follow two of them and 0.001 % three, though 2.7 % in source code, with its rulers and tables.
    64 tokens hold a long sentence; longer phrases hardly fit three times into usual continuations.

    Args:
        sequences: ids of each output; those shorter than `copies` tokens count, as not looping.
        copies (`int`): repetitions that make a loop.
        longest (`int`): tokens in the longest phrase.
    Returns:
        ratio in [0, 1]; that of a single output tells whether it loops.
    Raises:
        ValueError: `copies < 2`, `longest < 1`, something other than token ids, or no output.
    """
    _at_least("copies", copies, 2)
    _at_least("longest", longest, 1)
    every = _sequences(sequences)
    loops = [
        any(ids[-copies * p : -p] == ids[p - copies * p :] for p in range(1, min(longest, len(ids) // copies) + 1))
        for ids in every
    ]
    return sum(loops) / len(loops)


def loop_continuation_probability(log_probabilities: Tensor, length: int) -> Tensor:
    """TP: mean probability of a sentence's tokens in its i-th copy, in a text that is this sentence `N` times.

    It rises with i in a model that reinforces its loops. Xu et al. 2022 (DITTO), https://arxiv.org/abs/2206.02369.

    Args:
        log_probabilities (`[..., T]`, floating, nats): of each token of the copies, given all before it. A token to
            start with gives the first one something to follow: for `ids` of `1 + T`,
            `logits[..., :-1, :].log_softmax(-1).gather(-1, ids[..., 1:, None])[..., 0]`.
        length (`int`): tokens in the sentence; `T = N * length`.
    Returns:
        `[N]`, float64, in [0, 1]: mean over the tokens of each copy, and over rows. A single number is `[i]`.
    Raises:
        ValueError: not floating, not whole copies, or positive or NaN and so no log-probabilities.
    """
    _at_least("length", length, 1)
    shape, dtype = list(log_probabilities.shape), log_probabilities.dtype
    if not dtype.is_floating_point or not shape or not log_probabilities.numel() or shape[-1] % length:
        raise ValueError(f"log_probabilities must be floating, of copies of {length} tokens, got {dtype} {shape}")
    if not (log_probabilities <= 1e-2).all():  # log_softmax of bfloat16 may round up; NaN compares false
        most = log_probabilities.max().item()
        raise ValueError(f"log_probabilities must not be positive, got {most}; normalise logits with log_softmax")
    return log_probabilities.double().exp().clamp(max=1).reshape(-1, shape[-1] // length, length).mean((0, 2))


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
    """self-BLEU-n: BLEU of each text against all others as references, averaged; high if they resemble each other.

    Zhu et al. 2018 (Texygen), https://arxiv.org/abs/1802.01886, here with sacrebleu's tokenization and smoothing. It
    rises with the number of texts, and its time with the square of it: compare equal numbers, some hundred.

    Args:
        texts: two or more, such as samples that continue one prompt.
        n (`int`): tokens in the longest n-gram.
    Returns:
        ratio in [0, 1].
    Raises:
        ValueError: `n < 1`, fewer than two texts, or something other than text.
        ImportError: sacrebleu is not installed.
    """
    _at_least("n", n, 1)
    every = _texts(texts, 2)
    bleu = _optional("sacrebleu", "sacrebleu").BLEU(max_ngram_order=n, effective_order=True)
    scores = [bleu.sentence_score(text, every[:i] + every[i + 1 :]).score for i, text in enumerate(every)]
    return min(math.fsum(scores) / len(scores) / 100, 1.0)  # equal texts round to a little more


def compression_ratio(texts: Sequence[str]) -> float:
    """Compression ratio: bytes of the texts, joined by spaces, over bytes of their gzip; high for repetition.

    Shaib et al. 2024, https://arxiv.org/abs/2403.00553. gzip looks back 32 KiB, so far repetition is not seen.

    Args:
        texts: one or more; their order matters a little.
    Returns:
        ratio above 0: below 1 for a few words (there is a header), 2 to 3 for much prose, up to 1000 for loops.
    Raises:
        ValueError: no text, only blank text, or something other than text.
    """
    joined = " ".join(_texts(texts, 1)).encode()
    if not joined.strip():
        raise ValueError(f"expected some text to compress, got {reprlib.repr(texts)}; leave out blank texts")
    return len(joined) / len(gzip.compress(joined, mtime=0))


def mauve(
    features: Tensor | np.ndarray, human_features: Tensor | np.ndarray, buckets: int | None = None, seed: int = 25
) -> float:
    """MAUVE: area under the curve of divergences of two sets of texts, histograms over buckets made by k-means.

    Pillutla et al. 2021, https://arxiv.org/abs/2102.01454, by the package `mauve-text`, with its scale of 5. Compare
    only at the same feature model, number of texts and buckets; the authors advise some thousand texts.

    Args:
        features (`[M, D]`): of each text of a model, such as the last hidden state of a large language model.
        human_features (`[M', D]`): of people's texts, by the same large model.
        buckets (`int`, *optional*): two or more; a tenth of the smaller set if left out.
        seed (`int`): of k-means.
    Returns:
        ratio in (0, 1], 1 for sets that fill the buckets alike.
    Raises:
        ValueError: features that are not finite matrices of equal width, fewer than 2 buckets or more than texts.
        ImportError: mauve-text is not installed.
    """
    model, human = _features("features", features), _features("human_features", human_features)
    fewest = min(len(model), len(human))
    if model.shape[1] != human.shape[1]:
        raise ValueError(f"the two features must be equally wide, got {model.shape} and {human.shape}; use one model")
    if buckets is not None and not 2 <= buckets <= fewest:
        raise ValueError(f"buckets must lie between 2 and {fewest}, the number of texts, got {buckets}")
    compute = _optional("mauve", "mauve-text").compute_mauve
    return float(compute(model, human, num_buckets=buckets or "auto", seed=seed).mauve)


def _sequences(sequences: Iterable[Ids], shortest: int = 0) -> list[list[int]]:
    """Return the sequences of at least `shortest` tokens as lists."""
    every = [_ids(sequence, number) for number, sequence in enumerate(sequences)]
    kept = [ids for ids in every if len(ids) >= shortest]
    if not kept:
        got = f"{len(every)} sequences, the longest of {max(map(len, every), default=0)}"
        raise ValueError(f"expected a sequence of {shortest} tokens or more, got {got}; generate (longer) text")
    return kept


def _ids(sequence: Ids, number: int) -> list[int]:
    """Return one sequence as a list of ints."""
    try:
        ids = [operator.index(token) for token in (sequence.tolist() if hasattr(sequence, "tolist") else sequence)]
    except TypeError as error:
        got = f"{type(sequence).__name__} {reprlib.repr(sequence)}; put a single sequence in a list, tokenize text"
        raise ValueError(f"sequence {number} must be a row of integer token ids, got {got}") from error
    if ids and min(ids) < 0:
        raise ValueError(f"token ids must not be negative, got {min(ids)} in sequence {number}; cut off what is masked")
    return ids


def _ngrams(sequences: Iterable[Ids], n: int) -> list[list[Gram]]:
    """Return the n-grams of each sequence that has any."""
    _at_least("n", n, 1)
    return [list(zip(*(ids[i:] for i in range(n)), strict=False)) for ids in _sequences(sequences, n)]


def _counts(sequences: Iterable[Ids], n: int) -> Counter[Gram]:
    """Count the n-grams of all sequences."""
    return Counter(gram for grams in _ngrams(sequences, n) for gram in grams)


def _texts(texts: Sequence[str], fewest: int) -> list[str]:
    """Return the texts as a list."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts) or len(texts) < fewest:
        got = f"{type(texts).__name__} {reprlib.repr(texts)}"
        raise ValueError(f"expected a list of {fewest} or more strings, got {got}; decode ids, list a single text")
    return list(texts)


def _features(name: str, features: Tensor | np.ndarray) -> np.ndarray:
    """Return a float32 matrix."""
    values = features.detach().float().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features, "f4")
    finite = bool(np.isfinite(values).all())
    if values.ndim != 2 or len(values) < 2 or not finite:
        raise ValueError(f"{name} must be finite and [M, D] with M of 2 or more, got {values.shape}, {finite=}")
    return values


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
