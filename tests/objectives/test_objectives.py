"""The objectives: values and gradients against their definitions, dense and in float64; numerical safety; memory."""

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from whisper_hf.objectives import (
    DIVERGENCES,
    Head,
    StoredSamples,
    StoredTop,
    Target,
    TeacherTarget,
    TokenLosses,
    chunked,
    chunked_distillation_loss,
    relative_distance,
    spread_layers,
    weighted_divergence,
)

N, WIDTH, V = 20, 6, 23
BETA, ALPHA = 0.3, 0.2  # not the defaults
UPSTREAM = 0.37  # gradient that the loss receives


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Poison what is allocated and not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# --- definitions -----------------------------------------------------------------------------------------------------


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """`sum a log(a / b)`, where `0 log 0 = 0`."""
    return (log_a.exp() * (log_a.clamp(min=-1e30) - log_b)).sum(-1)


def mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Logarithm of a weighted mean of probabilities."""
    return (weight * log_a.exp() + (1 - weight) * log_b.exp()).log()


def distance_of_sorted(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Fill the smaller vocabulary with probabilities of 0, sort both, and take the absolute distance."""
    size = max(log_p.shape[1], log_q.shape[1])
    p, q = (pad(log.exp(), (0, size - log.shape[1])).sort(descending=True).values for log in (log_p, log_q))
    return (p - q).abs().sum(-1)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of log p, log q
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: BETA * kl(p, mixture(p, q, BETA)) + (1 - BETA) * kl(q, mixture(p, q, BETA)),
    "skewed_kl": lambda p, q: kl(p, mixture(p, q, ALPHA)),
    "skewed_reverse_kl": lambda p, q: kl(q, mixture(q, p, ALPHA)),
    "total_variation": lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2,
    "universal": distance_of_sorted,
}
SAME_TOKENS = [name for name in FORMULAS if name != "universal"]


def contrast(logits: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
    """`log(1 + sum_c exp(z_c - z_y))`, where -1 is no candidate."""
    counts = one_hot(candidates + 1, logits.shape[1] + 1)[..., 1:].sum(1)
    return ((logits - logits.gather(1, labels[:, None])).exp() * counts).sum(-1).log1p()


def divergence_of(**weights: float) -> Callable:
    return weighted_divergence(weights, BETA, ALPHA)


def against_teacher(formula: Callable, target: TeacherTarget, temperature: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return what compares a student's logits, over temperature, with all of a teacher's."""
    teacher = copy.deepcopy(target.head.module).double()(target.hidden.double()) / temperature

    def compare(student: Tensor) -> Tensor:
        shared = None if target.is_universal else min(student.shape[1], teacher.shape[1])
        return formula(teacher[:, :shared].log_softmax(-1), student[:, :shared].log_softmax(-1))

    return compare


def coarsened(log: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities of some tokens and of any other, `[n, k + 1]`."""
    others = log.scatter(1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log.gather(1, tokens), others], 1)


def against_stored(formula: Callable, target: StoredTop) -> Callable[[Tensor], Tensor]:
    """Return what compares a student's logits with the likeliest tokens of a teacher and all others together."""

    def compare(student: Tensor) -> Tensor:
        log_q = student[:, : target.vocabulary].log_softmax(-1)
        return formula(target.log_probabilities.double(), coarsened(log_q, target.tokens))

    return compare


def outcome(losses: TokenLosses, hidden: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Return values, and gradients of the hidden states and of what can be trained."""
    leaves = [leaf for leaf in (hidden, *module.parameters()) if leaf.requires_grad]
    gradients = torch.autograd.grad(UPSTREAM * losses.loss, leaves)
    return {**losses._asdict(), **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}


def definition(
    hidden: Tensor,
    module: nn.Module,
    labels: Tensor,
    compare: Callable[[Tensor], Tensor] | None,
    *,
    divergence_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    diversity_weight: float = 0.0,
    candidates: Tensor | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Compute the loss from all logits at once, by autograd in float64."""
    hidden, module = hidden.detach().double().requires_grad_(hidden.requires_grad), copy.deepcopy(module).double()
    logits = module(hidden)
    divergence = torch.zeros(len(labels)) if compare is None else temperature**2 * compare(logits / temperature)
    surprise = cross_entropy(logits, labels, reduction="none")
    diversity = torch.zeros(len(labels)) if candidates is None else contrast(logits, labels, candidates)
    loss = divergence_weight * divergence.sum() + cross_entropy_weight * surprise.sum()
    loss = loss + diversity_weight * diversity.sum()
    return outcome(TokenLosses(loss, divergence, surprise, diversity), hidden, module)


def computed(hidden: Tensor, module: nn.Module, labels: Tensor, target: Target | None, **options) -> dict[str, Tensor]:
    losses = chunked_distillation_loss(hidden, module, labels, target, **options)
    return outcome(losses, hidden, module.module if isinstance(module, Head) else module)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Compare everything, to an error relative to its largest entry."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * value.abs().max().item()
        actual = got[name].to(value.dtype)
        torch.testing.assert_close(
            actual, value, rtol=tolerance, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- inputs ----------------------------------------------------------------------------------------------------------


class Identity(nn.Identity):
    """A head whose hidden states are logits already."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.out_features = vocabulary


def student_of(vocabulary: int = V, n: int = N, dtype=torch.float32) -> tuple[Tensor, nn.Linear, Tensor]:
    """Return hidden states, head and labels."""
    hidden = (2 * torch.randn(n, WIDTH)).to(dtype).requires_grad_()
    return hidden, nn.Linear(WIDTH, vocabulary).to(dtype), torch.randint(vocabulary, (n,))


def teacher_of(name: str | Callable, vocabulary: int = V, temperature: float = 1.0, n: int = N, **options):
    """Return a teacher wider than the student."""
    head = nn.Linear(WIDTH + 1, vocabulary).requires_grad_(False)
    divergence = divergence_of(**{name: 1.0}) if isinstance(name, str) else name
    options.setdefault("is_universal", name == "universal")
    return TeacherTarget(2 * torch.randn(n, WIDTH + 1), Head(head), divergence, temperature, **options)


def teacher_that_says(logits: Tensor, name: str, temperature: float = 1.0) -> TeacherTarget:
    return TeacherTarget(logits, Head(Identity(logits.shape[1])), divergence_of(**{name: 1.0}), temperature)


def stored(log: Tensor, k: int, name: str, vocabulary: int | None = None) -> StoredTop:
    """Keep the `k` likeliest tokens of `[n, V]` log probabilities."""
    tokens = log.topk(k).indices
    return StoredTop(tokens, coarsened(log, tokens), divergence_of(**{name: 1.0}), vocabulary)


# --- every divergence against its definition -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("teacher_vocabulary", [V - 5, V, V + 5])
@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.3])
def test_chunked_matches_definition(
    name: str, temperature: float, teacher_vocabulary: int, cross_entropy_weight: float
) -> None:
    target, student = teacher_of(name, teacher_vocabulary, temperature), student_of()
    options = {
        "divergence_weight": 0.7,
        "cross_entropy_weight": cross_entropy_weight,
        "temperature": temperature,
    }
    expected = definition(*student, against_teacher(FORMULAS[name], target, temperature), **options)
    for chunk_tokens in (1, 7, N + 1, None):
        assert_same(computed(*student, target, chunk_tokens=chunk_tokens, **options), expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_float64_heads_are_computed_in_float64(name: str) -> None:
    target, student = teacher_of(name), student_of(dtype=torch.float64)
    target = dataclasses.replace(target, hidden=target.hidden.double(), head=Head(target.head.module.double()))
    assert_same(computed(*student, target), definition(*student, against_teacher(FORMULAS[name], target)), 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_add_up_by_weight(temperature: float) -> None:
    weights = {name: 0.2 + 0.3 * i for i, name in enumerate(FORMULAS)}
    target, student = teacher_of(divergence_of(**weights), temperature=temperature), student_of()

    def formula(p: Tensor, q: Tensor) -> Tensor:
        return sum(weight * FORMULAS[name](p, q) for name, weight in weights.items())

    expected = definition(*student, against_teacher(formula, target, temperature), temperature=temperature)
    assert_same(computed(*student, target, temperature=temperature, chunk_tokens=7), expected)


def test_mixtures_are_even_or_a_tenth_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, ratios in (("jensen_shannon", (0.5, 0.9)), ("skewed_kl", (0.9, 0.1)), ("skewed_reverse_kl", (0.9, 0.1))):
        target, student = teacher_of(weighted_divergence({name: 1.0})), student_of()
        monkeypatch.setitem(globals(), "BETA", ratios[0])
        monkeypatch.setitem(globals(), "ALPHA", ratios[1])
        assert_same(computed(*student, target), definition(*student, against_teacher(FORMULAS[name], target)))


@pytest.mark.parametrize("chunk_tokens", [1, 7, N + 1])
def test_without_target_the_loss_is_cross_entropy(chunk_tokens: int) -> None:
    hidden, module, labels = student_of()
    options = {"cross_entropy_weight": 0.3, "divergence_weight": 5.0}
    got = computed(hidden, module, labels, None, chunk_tokens=chunk_tokens, **options)
    assert_same(got, definition(hidden, module, labels, None, **options))
    torch.testing.assert_close(got["loss"], 0.3 * cross_entropy(module(hidden), labels, reduction="sum"))


@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("name", ["forward_kl", None])
def test_contrast_with_candidates_matches_definition(name: str | None, cross_entropy_weight: float) -> None:
    student, target = student_of(), teacher_of(name, V - 5, 2.0) if name else None
    candidates = torch.rand(N, V).scatter(1, student[2][:, None], -1.0).topk(4).indices  # distinct, and not the label
    candidates[torch.rand(N, 4) > 0.6] = -1
    candidates[0] = -1
    options = {"cross_entropy_weight": cross_entropy_weight, "candidates": candidates, "temperature": 2.0}
    compare = against_teacher(FORMULAS[name], target, 2.0) if name else None
    for weight in (0.4, 0.0):
        if cross_entropy_weight or weight or name:
            expected = definition(*student, compare, diversity_weight=weight, **options)
            assert_same(computed(*student, target, diversity_weight=weight, chunk_tokens=7, **options), expected)


def test_contrast_of_extreme_logits_matches_definition() -> None:
    inputs = (torch.tensor([[0.0, 200.0, 0.0, 1.0], [0.0, -200.0, 0.0, 1.0]]), Identity(4), torch.tensor([0, 0]))
    inputs[0].requires_grad_()
    options = {"candidates": torch.tensor([[1, 2], [1, -1]]), "diversity_weight": 1.0}
    assert_same(computed(*inputs, None, **options), definition(*inputs, None, **options))


@pytest.mark.parametrize("name", SAME_TOKENS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name: str, temperature: float) -> None:
    hidden, module, labels = student_of()
    same = TeacherTarget(hidden.detach(), Head(module), divergence_of(**{name: 1.0}), temperature)
    got = computed(hidden, module, labels, same, temperature=temperature)
    different = computed(hidden, module, labels, teacher_of(name, temperature=temperature), temperature=temperature)
    for key in got.keys() - {"cross_entropy", "diversity"}:
        assert got[key].abs().max() < 1e-6 * max(different[key].abs().max(), 1.0), key


@pytest.mark.parametrize("name", FORMULAS)
def test_temperature_changes_the_result_beyond_its_scale(name: str) -> None:
    teacher, student = teacher_of(name), student_of()
    plain = computed(*student, teacher)
    for temperature in (0.5, 2.0):
        softened = dataclasses.replace(teacher, temperature=temperature)
        got = computed(*student, softened, temperature=temperature)
        for key in ("divergence", "gradient 0"):
            for scale in (1.0, temperature, temperature**2):
                assert (got[key] / scale - plain[key]).norm() > 0.05 * plain[key].norm()
        torch.testing.assert_close(got["cross_entropy"], plain["cross_entropy"])


# --- numerical safety ------------------------------------------------------------------------------------------------

NEVER = -torch.inf
EXTREMES = {  # logits of the teacher, logits of the student
    "sure of different tokens": ([200.0, 0.0, 0.0, 1.0], [0.0, 0.0, 200.0, 1.0]),
    "student sure": ([0.0, 1.0, 2.0, 0.0], [0.0, 200.0, 0.0, 1.0]),
    "teacher sure": ([0.0, 1.0, 200.0, 1.0], [1.0, 0.5, 0.0, 1.0]),
    "teacher excludes some": ([1.0, NEVER, 0.0, NEVER], [0.0, 1.0, 2.0, -1.0]),
    "teacher excludes all but one": ([NEVER, 0.0, NEVER, NEVER], [0.0, 1.0, 2.0, -1.0]),
    "teacher excludes what the student does not expect": ([1.0, NEVER, 0.0, 0.0], [0.0, -200.0, 2.0, -1.0]),
    "both underflow": ([0.0, 1.0, -200.0, -200.0], [1.0, 0.0, -201.0, -199.0]),
    "all large": ([5000.0, 5001.0, 5002.0, 5003.0], [-5000.0, -5002.0, -5004.0, -5000.0]),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_logits_match_definition(name: str, temperature: float, extreme: str) -> None:
    teacher, student = (torch.tensor([logits]) for logits in EXTREMES[extreme])
    inputs = (student.requires_grad_(), Identity(4), torch.tensor([1]))
    target = teacher_that_says(teacher, name, temperature)
    got = computed(*inputs, target, temperature=temperature)
    compare = against_teacher(FORMULAS[name], target, temperature)
    expected = definition(*inputs, compare, temperature=temperature)
    for key, value in expected.items():
        assert got[key].isfinite().all()
        if value.isfinite().all():  # reverse KL is infinite where the teacher excludes a token
            torch.testing.assert_close(got[key].double(), value.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", FORMULAS)
def test_logits_beyond_any_logarithm_are_finite(name: str) -> None:
    teacher, student = torch.tensor([[0.0, 1e6, 0.0, NEVER]]), torch.tensor([[1e6, 0.0, NEVER, NEVER]])
    got = computed(student.requires_grad_(), Identity(4), torch.tensor([0]), teacher_that_says(teacher, name))
    assert all(tensor.isfinite().all() for tensor in got.values())


# --- heads -----------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen head with a trained addition of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, V).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, V, bias=False)
        self.out_features = V

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


class Treated(nn.Module):
    """What `Head(module, scale, cap)` means."""

    def __init__(self, module: nn.Module, scale: float, cap: float | None) -> None:
        super().__init__()
        self.module, self.scale, self.cap = module, scale, cap

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.scale * self.module(hidden)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def head_of(kind: str) -> tuple[nn.Module | Head, nn.Module]:
    """Return a head, and a module that does the same to hidden states."""
    module = LowRank() if kind.startswith("low rank") else nn.Linear(WIDTH, V, bias=kind != "without bias")
    if kind == "patched":
        module.forward = types.MethodType(lambda self, hidden: nn.Linear.forward(self, hidden).sin(), module)
    elif kind == "only bias":
        module.weight.requires_grad_(False)
    elif kind == "only weight":
        module.bias.requires_grad_(False)
    elif kind == "frozen":
        module.requires_grad_(False)
    treatment = (0.5 if "scaled" in kind else 1.0, 3.0 if "capped" in kind else None)
    return (module, module) if treatment == (1.0, None) else (Head(module, *treatment), Treated(module, *treatment))


PLAIN_HEADS = ["with bias", "without bias", "only bias", "only weight", "frozen"]
OTHER_HEADS = ["low rank", "patched", "scaled", "capped", "scaled and capped", "low rank, scaled and capped"]


@pytest.mark.parametrize("kind", PLAIN_HEADS + OTHER_HEADS)
def test_every_head_matches_definition(kind: str, count_calls) -> None:
    """And it is known which path ran: only the general one differentiates each chunk by autograd."""
    head, module = head_of(kind)
    hidden, _, labels = student_of()
    target = teacher_of("jensen_shannon")
    expected = definition(hidden, module, labels, against_teacher(FORMULAS["jensen_shannon"], target))
    differentiated = count_calls(chunked.torch.autograd, "grad")
    losses = chunked_distillation_loss(hidden, head, labels, target, chunk_tokens=7)
    assert len(differentiated) == (0 if kind in PLAIN_HEADS else 3)
    assert (head if isinstance(head, Head) else Head(head)).is_linear == (kind in PLAIN_HEADS)
    assert_same(outcome(losses, hidden, module), expected)


@pytest.mark.parametrize("kind", PLAIN_HEADS + OTHER_HEADS)
def test_what_is_frozen_gets_no_gradient(kind: str) -> None:
    head, module = head_of(kind)
    hidden, _, labels = student_of()
    target = teacher_of("forward_kl")
    target.head.module.requires_grad_(True)  # a teacher is, even when somebody forgot to say so
    chunked_distillation_loss(hidden, head, labels, target, chunk_tokens=7).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in target.head.module.parameters())


@pytest.mark.parametrize("kind", PLAIN_HEADS + OTHER_HEADS)
def test_a_head_can_be_trained_alone(kind: str) -> None:
    head, module = head_of(kind)
    hidden, _, labels = student_of()
    options = {"cross_entropy_weight": 1.0, "chunk_tokens": 7}
    losses = chunked_distillation_loss(hidden.detach(), head, labels, None, **options)
    assert losses.loss.requires_grad == (kind != "frozen")
    if kind != "frozen":
        expected = definition(hidden.detach(), module, labels, None, cross_entropy_weight=1.0)
        assert_same(outcome(losses, hidden.detach(), module), expected)


@pytest.mark.parametrize("patched", [False, True])
def test_a_tied_weight_collects_all_its_gradients(patched: bool) -> None:
    """The embedding gives the hidden states, the head reads them, and a penalty is on it, too."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        module, labels = nn.Linear(WIDTH, V).to(dtype), torch.randint(V, (N,))
        embedding = nn.Embedding(V, WIDTH, dtype=dtype)
        embedding.weight = module.weight
        if patched:
            module.forward = types.MethodType(nn.Linear.forward, module)
        hidden = embedding(labels.flip(0)).tanh() * 3
        if dtype == torch.float32:
            loss = chunked_distillation_loss(
                hidden, module, labels, None, cross_entropy_weight=1.0, chunk_tokens=7
            ).loss
        else:
            loss = cross_entropy(module(hidden), labels, reduction="sum")
        (loss + module.weight.square().sum()).backward()
        gradients.append({"weight": module.weight.grad, "bias": module.bias.grad})
    assert_same(*gradients)


# --- low precision ---------------------------------------------------------------------------------------------------

LOW_PRECISION = {  # dtypes of hidden states and head; whether under autocast
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "autocast": (torch.float32, torch.float32, True),
    "autocast from bfloat16": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("mode", LOW_PRECISION)
@pytest.mark.parametrize("kind", ["with bias", "low rank"])
def test_low_precision_is_close_and_keeps_dtypes(name: str, mode: str, kind: str) -> None:
    hidden_dtype, head_dtype, autocast = LOW_PRECISION[mode]
    hidden, _, labels = student_of()
    hidden, module = hidden.detach().to(hidden_dtype).requires_grad_(), head_of(kind)[0].to(head_dtype)
    target = teacher_of(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = computed(hidden, module, labels, target, chunk_tokens=7)
    expected = definition(hidden, module, labels, against_teacher(FORMULAS[name], target))
    jumps = name in ("total_variation", "universal")  # their gradients do, where rounding changes a sign or an order
    dtypes = dict.fromkeys(expected, head_dtype) | {"gradient 0": hidden_dtype}
    dtypes |= dict.fromkeys(TokenLosses._fields, torch.float32)
    for key, value in expected.items():
        assert got[key].dtype == dtypes[key]
        assert got[key].isfinite().all()
        if not (jumps and key.startswith("gradient")):
            assert (got[key] - value).norm() <= 0.05 * value.norm(), key


@pytest.mark.parametrize("name", FORMULAS)
def test_values_are_float32_under_autocast(name: str) -> None:
    logits, labels = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    target = teacher_that_says(torch.randn(N, V), name)
    with torch.autocast("cpu", torch.bfloat16):
        got = computed(logits, Identity(V), labels, target)
    assert_same(got, computed(logits, Identity(V), labels, target))


@pytest.mark.parametrize("kind", ["with bias", "low rank"])
def test_a_loss_scale_beyond_float16_does_not_overflow(kind: str) -> None:
    """As of a gradient scaler, which starts at 65536 where float16 ends at 65504."""
    (hidden, _, labels), module = student_of(dtype=torch.float16), head_of(kind)[0].half()
    options = {"cross_entropy_weight": 1e-3, "chunk_tokens": 7}
    leaves, results = [leaf for leaf in (hidden, *module.parameters()) if leaf.requires_grad], []
    for factor in (1.0, 1e5):
        loss = factor * chunked_distillation_loss(hidden, module, labels, None, **options).loss
        results.append([gradient.float() / factor for gradient in torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-6)


# --- memory and autograd ---------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of any operation's result."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


def target_of(kind: str, n: int) -> Target | None:
    """Return any kind of target for the vocabulary `V`."""
    if kind in FORMULAS:
        return teacher_of(kind, n=n)
    tokens, weights = torch.rand(n, V).topk(3).indices, torch.rand(n, 4)
    if kind == "top":
        return StoredTop(tokens, weights.log_softmax(-1), divergence_of(forward_kl=1.0))
    return StoredSamples(tokens, weights[:, 0]) if kind == "samples" else None


TARGETS = ["none", "top", "samples", *FORMULAS]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("head", ["with bias", "low rank"])
def test_no_tensor_holds_the_logits_of_all_tokens(kind: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 400
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 40 * V)
    (hidden, _, labels), module, target = student_of(n=n), head_of(head)[0], target_of(kind, n)
    with LargestTensor() as largest:
        losses = chunked_distillation_loss(hidden, module, labels, target, cross_entropy_weight=0.5)
        losses.loss.backward()
    assert 40 * V <= largest.elements < n * V / 2
    with LargestTensor() as dense:  # the recorder sees what it should
        cross_entropy(module(hidden), labels).backward()
    assert dense.elements >= n * V


def test_chunks_are_larger_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    n, sizes = 10 * WIDTH, []
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", V)  # a token at a time
    (hidden, _, labels), module = student_of(n=n), head_of("without bias")[0]
    terms = chunked._terms
    monkeypatch.setattr(chunked, "_terms", lambda logits, *a, **k: sizes.append(len(logits)) or terms(logits, *a, **k))
    chunked_distillation_loss(hidden, module, labels, None, cross_entropy_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        chunked_distillation_loss(hidden, module, labels, None, cross_entropy_weight=1.0)
    assert sizes == [1] * n + [WIDTH] * 10


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("head", ["with bias", "low rank"])
def test_no_tokens_give_no_loss(kind: str, head: str) -> None:
    (hidden, _, labels), module = student_of(n=0), head_of(head)[0]
    losses = chunked_distillation_loss(hidden, module, labels, target_of(kind, 0), cross_entropy_weight=1.0)
    losses.loss.backward()
    assert losses.loss == 0
    assert all(values.shape == (0,) for values in losses[1:])
    assert hidden.grad.shape == (0, WIDTH)
    assert all((p.grad == 0).all() for p in module.parameters() if p.requires_grad)


def test_a_second_backward_pass_is_refused() -> None:
    loss = chunked_distillation_loss(*student_of(), teacher_of("forward_kl")).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_a_second_derivative_is_refused() -> None:
    hidden, module, labels = student_of()
    loss = chunked_distillation_loss(hidden, module, labels, teacher_of("forward_kl")).loss
    gradient = torch.autograd.grad(loss.square(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", ["with bias", "low rank"])
def test_without_gradients_there_is_no_graph_and_the_same_loss(kind: str, count_calls) -> None:
    (hidden, _, labels), module, target = student_of(), head_of(kind)[0], teacher_of("forward_kl")
    expected = chunked_distillation_loss(hidden, module, labels, target, cross_entropy_weight=0.5)
    derived = count_calls(chunked, "logits_gradient")
    with torch.no_grad():
        losses = chunked_distillation_loss(hidden, module, labels, target, cross_entropy_weight=0.5)
    assert not derived
    assert expected.loss.requires_grad
    assert not any(values.requires_grad for values in (*expected[1:], *losses))
    torch.testing.assert_close(losses, expected)


# --- stored predictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME_TOKENS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [None, V - 5])
def test_stored_top_matches_definition_over_coarsened_outcomes(
    name: str, temperature: float, vocabulary: int | None
) -> None:
    target = stored((2 * torch.randn(N, vocabulary or V)).log_softmax(-1), 4, name, vocabulary)
    student, options = student_of(), {"temperature": temperature, "cross_entropy_weight": 0.3}
    expected = definition(*student, against_stored(FORMULAS[name], target), **options)
    assert_same(computed(*student, target, chunk_tokens=7, **options), expected)


def test_tokens_beyond_the_stored_vocabulary_are_left_alone() -> None:
    logits, labels = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    tokens = torch.randint(V - 5, (N, 3))
    top = stored(torch.randn(N, V - 5).log_softmax(-1), 3, "forward_kl", V - 5)
    for target in (top, StoredSamples(tokens, torch.zeros(N), V - 5)):
        gradient = computed(logits, Identity(V), labels, target)["gradient 0"]
        assert (gradient[:, V - 5 :] == 0).all()
        assert (gradient[:, : V - 5] != 0).all()


@pytest.mark.parametrize("name", SAME_TOKENS)
def test_stored_top_never_exceeds_the_divergence_and_reaches_it(name: str) -> None:
    """More is known with every token; with all but one, or all, nothing is missing."""
    logits, labels = 2 * torch.randn(N, V), torch.randint(V, (N,))
    inputs = ((2 * torch.randn(N, V)).requires_grad_(), Identity(V), labels)
    full = computed(*inputs, teacher_that_says(logits, name))
    below = torch.zeros(N)
    for k in (1, 3, 10, V - 1, V):
        got = computed(*inputs, stored(logits.log_softmax(-1), k, name))
        assert (got["divergence"] >= below - 1e-5).all()
        assert (got["divergence"] <= full["divergence"] + 1e-5).all()
        below = got["divergence"]
        assert k >= V - 1 or (got["gradient 0"] - full["gradient 0"]).norm() > 0.01 * full["gradient 0"].norm()
        if k >= V - 1:
            assert_same(got, full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_top_in_half_precision_is_close(dtype: torch.dtype) -> None:
    exact, student = stored(torch.randn(N, V).log_softmax(-1), 4, "forward_kl"), student_of()
    rounded = dataclasses.replace(exact, log_probabilities=exact.log_probabilities.to(dtype))
    assert_same(computed(*student, rounded), computed(*student, exact), 0.03)


@pytest.mark.parametrize("name", SAME_TOKENS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_stored_top_of_extreme_logits_matches_definition(name: str, extreme: str) -> None:
    teacher, student = (torch.tensor([logits]) for logits in EXTREMES[extreme])
    inputs = (student.requires_grad_(), Identity(4), torch.tensor([1]))
    target = stored(teacher.log_softmax(-1), 2, name)
    got, expected = computed(*inputs, target), definition(*inputs, against_stored(FORMULAS[name], target))
    for key, value in expected.items():
        assert got[key].isfinite().all()
        if value.isfinite().all():
            torch.testing.assert_close(got[key].double(), value.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", SAME_TOKENS)
def test_a_weighted_stored_top_is_finite_for_a_student_that_excludes_all_others(name: str) -> None:
    student = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)
    target = StoredTop(torch.tensor([[0]]), torch.tensor([[0.01, 0.99]]).log(), divergence_of(**{name: 9.0}))
    got = computed(student, Identity(4), torch.tensor([0]), target)
    assert all(tensor.isfinite().all() for tensor in got.values())


DRAWS, FEW = 4000, 4  # rows, and samples in each


def draws_from(log: Tensor) -> StoredSamples:
    """Draw from `[V]` log probabilities, many times."""
    tokens = log.exp().multinomial(DRAWS * FEW, replacement=True).view(DRAWS, FEW)
    return StoredSamples(tokens, -(log.exp() * log).sum().expand(DRAWS))


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """Five standard errors: fewer than one entry in a million would be further off by chance."""
    error = samples.std(0) / DRAWS**0.5
    assert ((samples.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert (5 * error < 0.1 * expected.abs().max().clamp(min=0.5)).all()  # or the test would say nothing


def test_samples_estimate_forward_kl_and_its_gradient_without_bias() -> None:
    teacher, logits = (2 * torch.randn(2, 1, 10, dtype=torch.float64)).unbind()
    label = torch.tensor([0])
    inputs = (logits.expand(DRAWS, -1).requires_grad_(), Identity(10), label.expand(DRAWS))
    got = computed(*inputs, draws_from(teacher[0].log_softmax(-1)))
    exact = computed(logits.requires_grad_(), Identity(10), label, teacher_that_says(teacher, "forward_kl"))
    assert_mean(got["divergence"], exact["divergence"])
    assert_mean(got["gradient 0"], exact["gradient 0"][0])


def test_samples_of_a_certain_teacher_are_exact() -> None:
    logits = torch.randn(N, V, requires_grad=True)
    labels = torch.randint(V, (N,))
    certain = torch.full((N, V), NEVER).scatter(1, labels[:, None], 0.0)
    samples = StoredSamples(labels[:, None].expand(-1, FEW), torch.zeros(N))
    got = computed(logits, Identity(V), labels, samples)
    assert_same(got, computed(logits, Identity(V), labels, teacher_that_says(certain, "forward_kl")))
    torch.testing.assert_close(got["divergence"], got["cross_entropy"])


def test_samples_and_coarsening_leave_a_perfect_student_alone_where_truncation_pulls() -> None:
    """Renormalising the likeliest tokens makes a perfect student too sure of itself."""
    logits = torch.randn(1, 10, dtype=torch.float64)
    label = torch.tensor([0])
    inputs = (logits.clone().requires_grad_(), Identity(10), label)
    likeliest = torch.full_like(logits, NEVER).scatter(1, logits.topk(FEW).indices, logits.topk(FEW).values)
    truncated = computed(*inputs, teacher_that_says(likeliest, "forward_kl"))
    assert truncated["divergence"] > 0.1
    assert truncated["gradient 0"].abs().max() > 0.05 * UPSTREAM
    assert computed(*inputs, stored(logits.log_softmax(-1), FEW, "forward_kl"))["gradient 0"].abs().max() < 1e-12
    rows = (logits.expand(DRAWS, -1).requires_grad_(), Identity(10), label.expand(DRAWS))
    sampled = computed(*rows, draws_from(logits[0].log_softmax(-1)))
    assert_mean(sampled["divergence"], torch.zeros(()))
    assert_mean(sampled["gradient 0"], torch.zeros(10))


# --- other tokenizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
def test_only_universal_ignores_which_token_is_which(name: str) -> None:
    logits, student = torch.randn(N, V), student_of()
    got = computed(*student, teacher_that_says(logits, name))
    permuted = computed(*student, teacher_that_says(logits[:, torch.randperm(V)], name))
    if name == "universal":
        assert_same(got, permuted)
    else:
        assert (got["divergence"] - permuted["divergence"]).abs().max() > 0.01


@pytest.mark.parametrize("name", FORMULAS)
def test_tokens_without_a_partner_only_have_cross_entropy(name: str) -> None:
    student, target = student_of(), teacher_of(name, has_partner=torch.rand(N) > 0.4)
    formula = against_teacher(FORMULAS[name], target)
    expected = definition(*student, lambda logits: formula(logits) * target.has_partner, cross_entropy_weight=0.3)
    got = computed(*student, target, cross_entropy_weight=0.3, chunk_tokens=7)
    assert_same(got, expected)
    assert ((got["divergence"] != 0) == target.has_partner).all()


# --- states ----------------------------------------------------------------------------------------------------------


def test_relative_distance_is_a_ratio_free_of_scale() -> None:
    student, teacher = torch.randn(2, N, WIDTH, requires_grad=True).unbind()
    expected = (student - teacher).norm(dim=1) ** 2 / teacher.norm(dim=1) ** 2
    got = relative_distance(student, teacher)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(relative_distance(100 * student, 100 * teacher), got)
    assert (relative_distance(teacher, teacher) == 0).all()
    torch.testing.assert_close(relative_distance(0 * student, teacher), torch.ones(N))
    gradients = [torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_relative_distance_is_float32_and_finite() -> None:
    huge = torch.full((N, WIDTH), 6e4, dtype=torch.float16)
    got = relative_distance(-huge, huge)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full((N,), 4.0))
    assert relative_distance(huge, torch.zeros_like(huge)).isfinite().all()


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "expected"),
    [(1, 5, [4]), (3, 3, [0, 1, 2]), (2, 6, [2, 5]), (3, 12, [3, 7, 11]), (3, 4, [0, 2, 3]), (4, 2, [0, 0, 1, 1])],
)
def test_layers_are_paired_at_the_same_depth(num_student: int, num_teacher: int, expected: list[int]) -> None:
    assert spread_layers(num_student, num_teacher) == list(enumerate(expected))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_unknown_divergence_lists_all_names() -> None:
    with pytest.raises(ValueError, match=r"'kl'.*" + ".*".join(FORMULAS)):
        weighted_divergence({"forward_kl": 1.0, "kl": 1.0})
    with pytest.raises(ValueError, match="no divergence.*" + ".*".join(FORMULAS)):
        weighted_divergence({})
    assert list(DIVERGENCES) == list(FORMULAS)


@pytest.mark.parametrize("weight", [0.0, -1.0, torch.nan])
def test_a_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(ValueError, match=f"forward_kl must be positive, got {weight}"):
        weighted_divergence({"forward_kl": weight})


@pytest.mark.parametrize("name", ["beta", "alpha"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.1, torch.nan])
def test_a_mixture_lies_between_its_parts(name: str, ratio: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1, got {ratio}"):
        weighted_divergence({"forward_kl": 1.0}, **{name: ratio})


@pytest.mark.parametrize("temperature", [0.0, -1.0, torch.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        chunked_distillation_loss(*student_of(), None, cross_entropy_weight=1.0, temperature=temperature)


def test_every_hidden_state_needs_a_label() -> None:
    hidden, module, labels = student_of()
    with pytest.raises(ValueError, match=f"{N - 1} labels for {N} states"):
        chunked_distillation_loss(hidden, module, labels[1:], None, cross_entropy_weight=1.0)
