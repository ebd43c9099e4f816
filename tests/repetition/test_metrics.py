"""Metrics of repetition and variety: values worked out by hand, references by brute force, order, edges and errors."""

import ast
import functools
import gzip
import importlib.util
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from whisper_hf.repetition import metrics
from whisper_hf.repetition.metrics import (
    compression_ratio,
    distinct,
    diversity,
    expectation_adjusted_distinct,
    loop_continuation_probability,
    looping_share,
    mauve,
    ngram_entropy,
    self_bleu,
    sequence_repetition,
    token_repetition,
)

PROSE = [
    "It was a quiet morning, and nobody in the village had expected the letter that the postman brought.",
    "She folded the map twice, put it away, and asked the captain how far they still had to sail before dark.",
    "Rain fell on the roofs of the old town while the two brothers argued about which road led to the mill.",
]
LOOPS = ["I do not know. " * 8, "the end of the end of the end of the end of the end of the end", "no " * 30]
OF_IDS: list[Callable[..., float]] = [
    sequence_repetition,
    diversity,
    distinct,
    functools.partial(expectation_adjusted_distinct, vocabulary_size=60),
    ngram_entropy,
    looping_share,
]
RISES_WITH_REPETITION = [True, False, False, False, False, True]
needs_sacrebleu = pytest.mark.skipif(not importlib.util.find_spec("sacrebleu"), reason="sacrebleu is not installed")
needs_mauve = pytest.mark.skipif(not importlib.util.find_spec("mauve"), reason="mauve-text is not installed")


def random_corpora(count: int = 40) -> list[list[list[int]]]:
    """Return corpora of few tokens, so that n-grams repeat; every fourth sequence is too short for 4-grams."""
    draw = random.Random(0)
    lengths = [[draw.randint(0, 3) if i % 4 == 3 else draw.randint(4, 30) for i in range(5)] for _ in range(count)]
    return [[draw.choices(range(draw.randint(1, 6)), k=length) for length in each] for each in lengths]


def count_ngrams(ids: list[int], n: int) -> tuple[int, int]:
    """Count distinct n-grams and all of them, comparing every pair."""
    starts = range(len(ids) - n + 1)
    is_new = [not any(ids[s : s + n] == ids[t : t + n] for s in range(t)) for t in starts]
    return sum(is_new), len(starts)


def loops_reference(ids: list[int], copies: int, longest: int) -> bool:
    """Say it again as copies of a phrase."""
    return any(
        len(ids) >= copies * p and ids[len(ids) - copies * p :] == ids[len(ids) - p :] * copies
        for p in range(1, longest + 1)
    )


def test_sequence_repetition_by_hand() -> None:
    assert sequence_repetition([[1, 2, 1, 2, 1]], n=2) == 0.5  # 12 21 12 21
    assert sequence_repetition([[1, 2, 1, 2, 1], [1, 2, 3]], n=2) == 0.25
    assert sequence_repetition([[7] * 11], n=4) == pytest.approx(7 / 8)
    assert sequence_repetition([[7] * 11, [1, 2, 3]], n=4) == pytest.approx(7 / 8)  # the short one is left out
    assert sequence_repetition([[1, 2, 3, 4]]) == 0


def test_diversity_by_hand() -> None:
    # bigrams 12 23 31 12 23, trigrams 123 231 312 123, 4-grams 1231 2312 3123
    assert diversity([[1, 2, 3, 1, 2, 3]]) == pytest.approx(3 / 5 * 3 / 4 * 1)
    # counts are summed before they are divided, and n-grams are distinct within a sequence only
    assert diversity([[1, 2, 3, 1, 2, 3], [1, 2, 3, 4], [9, 9]]) == pytest.approx(6 / 8 * 5 / 6 * 1)


def test_distinct_and_entropy_by_hand() -> None:
    corpus = [[1, 2, 1, 2], [1, 2, 3]]  # 12 21 12, 12 23
    assert distinct(corpus, n=2) == pytest.approx(3 / 5)
    assert ngram_entropy(corpus, n=2) == pytest.approx(-(3 / 5 * math.log(3 / 5) + 2 * 1 / 5 * math.log(1 / 5)))
    assert ngram_entropy([[5] * 9]) == 0
    assert ngram_entropy([range(11)]) == pytest.approx(math.log(8))


def test_expectation_adjusted_distinct_by_hand() -> None:
    assert expectation_adjusted_distinct([[0, 1], [0]], vocabulary_size=2) == pytest.approx(2 / (2 * (1 - 1 / 8)))
    assert expectation_adjusted_distinct([[0, 0]], vocabulary_size=1) == 1
    assert expectation_adjusted_distinct([[3]], vocabulary_size=50_000) == pytest.approx(1)


@pytest.mark.parametrize("length", [20, 200, 2000])
def test_expectation_adjusted_distinct_of_random_tokens_is_one_at_any_length(length: int) -> None:
    ids = random.Random(0).choices(range(500), k=length)
    assert expectation_adjusted_distinct([ids], vocabulary_size=500) == pytest.approx(1, abs=0.07)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, (1 / 5, 1 / 5)),  # the last guess alone
        (2, (3 / 5, 2 / 5)),
        (3, (4 / 5, 2 / 5)),
        (128, (4 / 5, 2 / 5)),
    ],
)
def test_token_repetition_by_hand(window: int, expected: tuple[float, float]) -> None:
    # the guesses are: new; 2 back and right; 2 back and wrong; 3 back and right; 1 back and wrong
    assert token_repetition([[1, 2, 1, 3, 2, 4]], [[5, 1, 2, 2, 2]], window) == pytest.approx(expected)


def test_token_repetition_matches_reference() -> None:
    draw = random.Random(1)
    for corpus in random_corpora():
        guesses = [draw.choices(range(8), k=max(len(ids) - 1, 0)) for ids in corpus]
        for window in (1, 3, 100):
            found = [
                (guess in ids[max(t - window, 0) : t], guess == ids[t])
                for ids, guessed in zip(corpus, guesses, strict=True)
                for t, guess in enumerate(guessed, start=1)
            ]
            share = sum(repeats for repeats, _ in found) / len(found)
            wrong = sum(repeats and not right for repeats, right in found) / len(found)
            assert token_repetition(corpus, guesses, window) == pytest.approx((share, wrong))
            assert wrong <= share


def test_right_predictions_are_never_wrong_repetition() -> None:
    ids = torch.randint(0, 5, (3, 40), generator=torch.Generator().manual_seed(0))
    repeated, wrong = token_repetition(ids, ids[:, 1:])
    assert repeated > 0.5
    assert wrong == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ngram_metrics_match_brute_force(n: int) -> None:
    for corpus in random_corpora():
        kept = [ids for ids in corpus if len(ids) >= n]
        shares = [1 - unique / total for unique, total in (count_ngrams(ids, n) for ids in kept)]
        assert sequence_repetition(corpus, n) == pytest.approx(sum(shares) / len(shares))
        grams = [tuple(ids[i : i + n]) for ids in kept for i in range(len(ids) - n + 1)]
        assert distinct(corpus, n) == pytest.approx(len(set(grams)) / len(grams))
        surprise = sum(-math.log(grams.count(gram) / len(grams)) for gram in grams) / len(grams)
        assert ngram_entropy(corpus, n) == pytest.approx(surprise, abs=1e-12)


def test_diversity_matches_brute_force() -> None:
    for corpus in random_corpora():
        counts = {n: [count_ngrams(ids, n) for ids in corpus if len(ids) >= 4] for n in (2, 3, 4)}
        expected = math.prod(sum(u for u, _ in each) / sum(t for _, t in each) for each in counts.values())
        assert diversity(corpus) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([], False),
        ([4, 4], False),
        ([4, 4, 4], True),
        ([8, 9, 1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([8, 9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], True),  # cut off inside the phrase
        ([8, 9, 1, 2, 3, 1, 2, 3, 1, 2], False),  # two copies and two thirds
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 7], False),  # it got out
        (list(range(64)) * 3, True),
        (list(range(65)) * 3, False),  # longer than the phrases looked for
    ],
)
def test_looping_by_hand(ids: list[int], loops: bool) -> None:
    assert looping_share([ids]) == loops
    assert looping_share([ids, [1, 2, 3, 4], [5]]) == pytest.approx(loops / 3)


@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize("longest", [1, 4, 64])
def test_looping_matches_reference(copies: int, longest: int) -> None:
    draw, found = random.Random(2), set()
    for _ in range(150):
        phrase = draw.choices(range(3), k=draw.randint(1, 6))
        ids = draw.choices(range(3), k=draw.randint(0, 5)) + (phrase * 6)[: draw.randint(0, 30)]
        expected = loops_reference(ids, copies, longest)
        found.add(expected)
        assert looping_share([ids], copies, longest) == expected
    assert found == {True, False}


def test_loop_continuation_probability_by_hand() -> None:
    probabilities = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9, 1.0], [0.3, 0.3, 0.5, 0.5, 0.8, 1.0]])
    mean = torch.tensor([0.25, 0.55, 0.925], dtype=torch.float64)
    torch.testing.assert_close(loop_continuation_probability(probabilities.log(), length=2), mean, rtol=0, atol=1e-6)
    one = loop_continuation_probability(probabilities[0].log(), length=3)
    torch.testing.assert_close(one, torch.tensor([0.3, 2.6 / 3], dtype=torch.float64), rtol=0, atol=1e-6)
    impossible = loop_continuation_probability(torch.tensor([float("-inf"), 0.0]), length=1)
    assert impossible.tolist() == [0, 1]


def test_loop_continuation_probability_rises_for_a_model_that_counts_what_it_saw() -> None:
    sentence, copies, vocabulary = [3, 1, 4, 1, 5], 4, 10
    ids = torch.tensor([[0, *sentence * copies]])
    follows = torch.zeros(vocabulary, vocabulary)
    logits = torch.empty(1, ids.shape[1], vocabulary)
    for place in range(ids.shape[1]):
        if place:
            follows[ids[0, place - 1], ids[0, place]] += 1
        logits[0, place] = (follows[ids[0, place]] + 0.1).log()  # unnormalised
    log_probabilities = logits[..., :-1, :].log_softmax(-1).gather(-1, ids[..., 1:, None])[..., 0]
    by_copy = loop_continuation_probability(log_probabilities, len(sentence))
    assert by_copy.shape == (copies,)
    assert (by_copy.diff() > 0).all()
    assert ((by_copy > 0) & (by_copy <= 1)).all()


@pytest.mark.parametrize("metric", OF_IDS)
def test_order_and_kind_of_sequences_do_not_matter(metric: Callable[..., float]) -> None:
    corpus = torch.randint(0, 5, (6, 20), generator=torch.Generator().manual_seed(0))
    corpus[2] = 3
    expected = metric(corpus.tolist())
    assert metric(corpus.flip(0)) == pytest.approx(expected)
    assert metric(corpus.numpy().astype(np.int16)) == expected
    assert metric([tuple(row) for row in corpus]) == expected  # of tensors without dimensions
    assert metric(row for row in corpus) == expected


@pytest.mark.parametrize("metric", OF_IDS)
def test_names_of_tokens_do_not_matter(metric: Callable[..., float]) -> None:
    for corpus in random_corpora(10):
        renamed = [[59 - 7 * token for token in ids] for ids in corpus]
        assert metric(renamed) == pytest.approx(metric(corpus), abs=1e-12)


@pytest.mark.parametrize("metric", OF_IDS)
def test_range(metric: Callable[..., float]) -> None:
    largest = {ngram_entropy: math.log(5 * 30)}.get(metric, 1.59)
    for corpus in random_corpora():
        assert 0 <= metric(corpus) <= largest


@pytest.mark.parametrize(("metric", "rises"), list(zip(OF_IDS, RISES_WITH_REPETITION, strict=True)))
def test_loops_are_told_from_prose(metric: Callable[..., float], rises: bool) -> None:
    words: dict[str, int] = {}
    prose, loops = (
        [[words.setdefault(word, len(words)) for word in text.split()[:15]] for text in texts]
        for texts in (PROSE, LOOPS)
    )
    assert (metric(loops) > metric(prose)) == rises
    assert metric(loops) != metric(prose)


def test_compression_ratio() -> None:
    assert compression_ratio(LOOPS) > 2 * compression_ratio(PROSE)
    assert compression_ratio(["a" * 100_000]) > 500
    assert 0 < compression_ratio(["few"]) < 1
    assert compression_ratio(PROSE * 3) > compression_ratio(PROSE)
    assert compression_ratio([PROSE[0], " ", PROSE[1]]) == compression_ratio(PROSE[:2])
    joined = "für, fünf".encode()  # bytes count, not characters
    assert compression_ratio(["für,", "fünf"]) == len(joined) / len(gzip.compress(joined))


@needs_sacrebleu
def test_self_bleu_matches_sacrebleu() -> None:
    import sacrebleu

    texts = [*PROSE, PROSE[0].replace("quiet", "noisy"), "   "]
    for n in (2, 4):
        bleu = sacrebleu.BLEU(max_ngram_order=n, effective_order=True)
        scores = [bleu.sentence_score(a, [b for b in texts[:-1] if b != a]).score for a in texts[:-1]]
        assert self_bleu(texts, n) == pytest.approx(sum(scores) / 400)
    default = [sacrebleu.sentence_bleu(a, [b for b in texts[:-1] if b != a]).score for a in texts[:-1]]
    assert self_bleu(texts) == pytest.approx(sum(default) / 400)


@needs_sacrebleu
def test_self_bleu_falls_with_variety() -> None:
    assert self_bleu([PROSE[0]] * 3) == 1
    alike = [PROSE[0], PROSE[0].replace("quiet", "noisy"), PROSE[0].replace("postman", "child")]
    assert 0 <= self_bleu(PROSE) < 0.2 < self_bleu(alike) < 1
    assert self_bleu(PROSE[::-1]) == pytest.approx(self_bleu(PROSE))


@needs_mauve
def test_mauve_tells_equal_from_different_features() -> None:
    generator = torch.Generator().manual_seed(0)
    human, model = torch.randn(60, 4, generator=generator), torch.randn(60, 4, generator=generator)
    near, far = mauve(model, human), mauve(model + 20 * torch.eye(4)[0], human - 20 * torch.eye(4)[0])
    assert 0 < far < 0.1 < near <= 1
    assert mauve(human.bfloat16(), human.bfloat16().float().numpy()) == pytest.approx(1, abs=0.01)
    assert mauve(model.requires_grad_(), human.double()) == near


@pytest.mark.parametrize("metric", OF_IDS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2, 3], r"row 0 must be token ids, got 1; list a single row"),
        ("a text", r"row 0 must be token ids, got 'a'"),
        ([[1, 2], ["a", "b"]], r"row 1 must be token ids, got \['a', 'b'\]"),
        ([[0.5, 1.0]], r"row 0 must be token ids, got \[0.5, 1.0\]"),
        (torch.zeros(5, dtype=torch.long), r"row 0 must be token ids"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"row 0 must be token ids"),
        (np.zeros((2, 8)), r"row 0 must be token ids"),
        ([[1] * 9, [5, -100, 5, 5]], r"token ids must not be negative, got -100 in row 1; cut off"),
        ([], r"expected sequences of at least \d tokens, got \[\]"),
    ],
)
def test_what_is_no_ids_is_refused(metric: Callable[..., float], given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(given)


@pytest.mark.parametrize("metric", [sequence_repetition, diversity, functools.partial(distinct, n=4), ngram_entropy])
def test_too_short_sequences_are_refused(metric: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match=r"at least 4 tokens, got \[3, 0\]"):
        metric([[1, 2, 3], []])
    assert math.isfinite(metric([[1, 2, 3], [], [1, 2, 3, 4]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_repetition([[1]], n=0), r"n must be at least 1, got 0"),
        (lambda: distinct([[1]], n=0), r"n must be at least 1, got 0"),
        (lambda: ngram_entropy([[1]], n=-1), r"n must be at least 1, got -1"),
        (lambda: self_bleu(PROSE, n=0), r"n must be at least 1, got 0"),
        (lambda: looping_share([[1]], copies=1), r"copies must be at least 2, got 1"),
        (lambda: looping_share([[1]], longest=0), r"longest must be at least 1, got 0"),
        (lambda: token_repetition([[1, 2]], [[1]], window=0), r"window must be at least 1, got 0"),
        (lambda: token_repetition([[1, 2]], [[1, 2]]), r"lengths \[1\] \(not all 0\), got \[2\]; logits.argmax"),
        (lambda: token_repetition([[1, 2], [3]], [[1]]), r"lengths \[1, 0\] \(not all 0\), got \[1\]"),
        (lambda: token_repetition([[1], []], [[], []]), r"lengths \[0, 0\] \(not all 0\), got \[0, 0\]"),
        (lambda: expectation_adjusted_distinct([[1, 7]], 7), r"must exceed every id, got 7 and the id 7"),
        (lambda: expectation_adjusted_distinct([[], []], 7), r"at least 1 tokens, got \[0, 0\]"),
        (lambda: self_bleu(PROSE[:1]), r"list of 2 or more texts that are not blank, got \['It was"),
        (lambda: self_bleu([PROSE[0], "\n"]), r"list of 2 or more texts"),
        (lambda: self_bleu(PROSE[0]), r"list of 2 or more texts that are not blank, got 'It was"),
        (lambda: self_bleu([[1, 2], [3]]), r"list of 2 or more texts .* got \[\[1, 2\], \[3\]\]"),
        (lambda: compression_ratio([]), r"list of 1 or more texts that are not blank, got \[\]"),
        (lambda: compression_ratio(["", " "]), r"list of 1 or more texts"),
        (lambda: compression_ratio("text"), r"list of 1 or more texts that are not blank, got 'text'"),
    ],
)
def test_errors_say_what_is_expected_and_what_was_given(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("values", "length", "message"),
    [
        (torch.zeros(5), 2, r"\[..., N \* length\], got torch.float32 \[5\] and length=2"),
        (torch.zeros(4), 0, r"and length=0"),
        (torch.zeros(0), 1, r"got torch.float32 \[0\]"),
        (torch.tensor(0.0), 1, r"got torch.float32 \[\]"),
        (torch.zeros(4, dtype=torch.long), 2, r"must be floating, .* got torch.int64 \[4\]"),
        (torch.tensor([-1.0, 3.5]), 1, r"must be log_softmax of logits, got 3.5 > 0"),
        (torch.tensor([-1.0, float("nan")]), 1, r"must be log_softmax of logits, got nan"),
    ],
)
def test_what_is_no_log_probability_is_refused(values: torch.Tensor, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop_continuation_probability(values, length)


@pytest.mark.parametrize(
    ("model", "human"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, 2), torch.tensor(0.0)),
        (torch.zeros(1, 2), torch.zeros(3, 2)),
        (torch.zeros(3, 2), np.full((3, 2), np.nan)),
    ],
)
def test_features_that_do_not_fit_are_refused(model: Any, human: Any) -> None:
    with pytest.raises(ValueError, match=r"features must be two \[2 or more, D\], finite, got .*finite="):
        mauve(model, human)


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("sacrebleu", "sacrebleu", lambda: self_bleu(PROSE)),
        ("mauve", "mauve-text", lambda: mauve(torch.zeros(3, 2), torch.zeros(3, 2))),
    ],
)
def test_a_missing_package_is_named(
    module: str, package: str, call: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf"needs {package} \(.*{module}.*\); install it with: pip install {package}"):
        call()


def test_public_names_are_those_documented_and_tested() -> None:
    functions = {name for name, value in vars(metrics).items() if getattr(value, "__module__", "") == metrics.__name__}
    assert {name for name in functions if not name.startswith("_")} == set(metrics.__all__)
    for name in metrics.__all__:
        documentation = getattr(metrics, name).__doc__
        assert all(part in documentation for part in ("arxiv.org", "Args:", "Returns:", "Raises:")) or (
            name == "looping_share"  # a rule of this project
        )
        assert name in globals()


def test_import_is_light() -> None:
    tree = ast.parse(Path(metrics.__file__).read_text())
    imported = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"torch", "numpy"}
