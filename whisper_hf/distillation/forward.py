"""One forward pass of student and teacher over a batch, down to the loss.

Legend: `B` rows of `T` tokens, `S` tokens of the teacher's rows under another tokenizer, `n` positions of a batch whose
predictions count, `H` width of the student, `C` candidates of a position.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.labels import IGNORED, documents_from_positions, shift
from ..objectives import (
    Head,
    StoredSamples,
    StoredTop,
    Target,
    TeacherTarget,
    chunked_distillation_loss,
    repeating_tokens,
)
from .config import DistillationConfig
from .head_replacement import HeadReplacement, attention_outputs

ON_POLICY = "on_policy"  # key that marks a batch whose text the student wrote


@dataclass
class Batch:
    """The parts of a training batch: inputs of both models, targets, and stored predictions.

    Attributes:
        inputs (mapping from `str` to tensors): the inputs of the student's forward pass.
        targets (`[B, T]`, int64): the token to predict from each position; -100 where no prediction counts.
        teacher_inputs (mapping from `str` to `[B, S]`): the inputs of a teacher with another tokenizer, or empty.
        teacher_targets (`[B, S]`, int64, *optional*): the token for such a teacher to predict from each position.
        signals (mapping from `str` to `[B, T, ...]`): stored predictions of the teacher, or empty.
        is_on_policy (`bool`): whether the student wrote the text.
    """

    inputs: dict[str, Any]
    targets: Tensor
    teacher_inputs: dict[str, Tensor] = field(default_factory=dict)
    teacher_targets: Tensor | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)
    is_on_policy: bool = False

    @classmethod
    def split(cls, inputs: dict[str, Any], label_name: str) -> "Batch":
        """Split a collator's batch into its parts, by the names of its entries.

        Args:
            inputs (mapping from `str` to tensors): the batch; it is not changed.
            label_name (`str`): the name of the labels, `[B, T]`.

        Raises:
            ValueError: a batch without labels.
        """
        inputs = dict(inputs)
        is_on_policy = bool(inputs.pop(ON_POLICY, False))
        teacher = {k.removeprefix("teacher_"): inputs.pop(k) for k in list(inputs) if k.startswith("teacher_")}
        labels = inputs.pop(label_name, None)
        shifted = inputs.pop("shift_labels", None)
        if labels is None and shifted is None:
            raise ValueError(
                f"expected {label_name!r} in the batch, got {sorted(inputs)}; use "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False), or keep the column in the data set"
            )
        teacher_labels = teacher.pop("labels", None)
        is_other_text = "input_ids" in teacher
        return cls(
            inputs,
            shift(labels) if shifted is None else shifted,
            teacher_inputs=teacher if is_other_text else {},
            teacher_targets=None if teacher_labels is None else shift(teacher_labels),
            signals={} if is_other_text else teacher,
            is_on_policy=is_on_policy,
        )

    @property
    def counts(self) -> Tensor:
        """Whether the prediction at each position counts, `[B, T]`, bool; `n` of them do."""
        return self.targets != IGNORED


@dataclass
class BatchLosses:
    """The loss of a batch, and its terms per token.

    Attributes:
        loss (scalar): the weighted sum of all terms over all tokens, differentiable.
        terms (mapping from `str` to `[n]`): each term without weight and gradient.
    """

    loss: Tensor
    terms: dict[str, Tensor]


class DistillationForward:
    """Run student and teacher up to their heads, and compute the loss in place of the student's head.

    The teacher runs inside the student's forward pass, when the student's head would be applied. At that moment the
    weights of both heads are complete even if they are sharded, and logits exist for one chunk of tokens only.

    Args:
        config ([`DistillationConfig`]): the weights of the losses.
        teacher (`nn.Module`, *optional*): the teacher, placed and frozen. Without a teacher, batches hold its stored
            predictions.
        teacher_model (`PreTrainedModel`, *optional*): the same teacher without wrappers.
        matching (`nn.Module`, *optional*): a [`StateMatching`], perhaps in a wrapper.
        stored_vocabulary (`int`, *optional*): number of tokens that stored predictions cover, counted from token 0.
    """

    def __init__(
        self,
        config: DistillationConfig,
        teacher: nn.Module | None,
        teacher_model: Any,
        matching: nn.Module | None,
        stored_vocabulary: int | None = None,
    ) -> None:
        self.config = config
        self.divergence = config.weighted_divergence()
        self.teacher = teacher
        self.teacher_model = teacher_model
        self.teacher_head = None if teacher_model is None else HeadReplacement(teacher_model)
        self.matching = matching
        self.stored_vocabulary = stored_vocabulary
        self.kinds = config.state_kinds

    def __call__(self, model: nn.Module, student: Any, student_head: HeadReplacement, batch: Batch) -> BatchLosses:
        """Compute the losses of a batch.

        Args:
            model (`nn.Module`): the student, as wrapped for training. It is called once.
            student (`PreTrainedModel`): the same student without wrappers.
            student_head ([`HeadReplacement`]): the replacement of the student's head.
            batch ([`Batch`]): the batch, on the student's device.

        Returns:
            [`BatchLosses`].

        Raises:
            ValueError: the teacher's tokens or its stored signals are missing in the batch, or are not expected there.
        """
        states: dict[str, dict[str, Any]] = {"student": {}, "teacher": {}}
        terms: dict[str, Tensor] = {}

        def at_head(hidden: Tensor) -> Tensor:
            return self._at_student_head(hidden, student_head, batch, states["teacher"], terms)

        def forward() -> Any:
            return self._run(model, student, batch.inputs, states["student"])

        _, loss = student_head.run(forward, at_head)
        if self.matching is not None:
            for kind, distances in self.matching(states["student"], states["teacher"], batch.counts).items():
                loss = loss + getattr(self.config, f"{kind}_weight") * distances.sum()
                terms[kind] = distances.detach()
        return BatchLosses(loss, terms)

    def _run(self, model: nn.Module, unwrapped: Any, inputs: dict[str, Any], states: dict[str, Any]) -> Any:
        """Run a model whose head is replaced, and add its hidden states and attention outputs to `states` on demand."""
        with ExitStack() as stack:
            if "attention_outputs" in self.kinds:
                states["attention_outputs"] = stack.enter_context(attention_outputs(unwrapped))
            needs_states = {"output_hidden_states": True} if "hidden_states" in self.kinds else {}
            outputs = model(**inputs, use_cache=False, **needs_states)
        if needs_states:
            states["hidden_states"] = outputs.hidden_states[1:]
        return outputs

    def _at_student_head(
        self, hidden: Tensor, head: HeadReplacement, batch: Batch, states: dict, terms: dict[str, Tensor]
    ) -> Tensor:
        """Compute the loss of a batch from the inputs of the student's head, `[B, T, H]`; fill `terms`."""
        counts = batch.counts
        candidates = self._candidates(batch)

        def loss_against(target: Target | None) -> Tensor:
            is_plain = target is None  # evaluation without stored signals, which cover the training data only
            cross_entropy_weight = 0.0 if batch.is_on_policy else self.config.cross_entropy_weight
            if is_plain:
                cross_entropy_weight = 1.0
            losses = chunked_distillation_loss(
                hidden[counts],
                head.head,
                batch.targets[counts],
                target,
                divergence_weight=self.config.divergence_weight,
                cross_entropy_weight=cross_entropy_weight,
                diversity_weight=0.0 if is_plain else self.config.diversity_weight,
                candidates=candidates,
                temperature=self.config.temperature,
                chunk_tokens=self.config.chunk_tokens,
            )
            if not is_plain:
                terms["divergence"] = losses.divergence
            if candidates is not None:
                terms["diversity"] = losses.diversity
            if not batch.is_on_policy:
                terms["cross_entropy"] = losses.cross_entropy
            return losses.loss

        teacher = self.teacher
        teacher_head = self.teacher_head
        if teacher is None or teacher_head is None:
            return loss_against(self._stored(batch))
        found: list[Tensor] = []
        needs_grad = torch.is_grad_enabled()

        def at_teacher_head(teacher_hidden: Tensor) -> Tensor:
            with torch.set_grad_enabled(needs_grad):
                found.append(loss_against(self._predicted(teacher_hidden, teacher_head.head, batch)))
            return teacher_hidden.new_zeros((), dtype=torch.float32)

        self._refuse_other_tokens(batch)
        with torch.no_grad():
            inputs = batch.teacher_inputs or batch.inputs
            teacher_head.run(lambda: self._run(teacher, self.teacher_model, inputs, states), at_teacher_head)
        return found[0]

    def _refuse_other_tokens(self, batch: Batch) -> None:
        """Raise a `ValueError` unless a batch holds the teacher's own tokens exactly if they are compared."""
        is_universal = "universal" in self.config.divergences
        has_teacher_inputs = bool(batch.teacher_inputs)
        has_teacher_targets = batch.teacher_targets is not None
        if has_teacher_inputs == is_universal and has_teacher_targets == is_universal:
            return
        if is_universal:
            tokenizer = "another tokenizer than the student's"
            expected = "teacher_input_ids, teacher_attention_mask and teacher_labels"
        else:
            tokenizer = "the student's tokenizer"
            expected = "none of the teacher's tokens"
        found = [f"teacher_{name}" for name in sorted(batch.teacher_inputs)] + ["teacher_labels"] * has_teacher_targets
        raise ValueError(
            f"divergence={self.config.divergence!r} compares with a teacher that has {tokenizer}: expected {expected} "
            f"in the batch, got {found or 'none'}; change the data set and its collator, or the divergence"
        )

    def _candidates(self, batch: Batch) -> Tensor | None:
        """Find the tokens that would continue a repetition, `[n, C]`, or return `None` if the loss ignores them."""
        if not self.config.diversity_weight or batch.is_on_policy:  # labels on policy may be the student's repetitions
            return None
        positions = batch.inputs.get("position_ids")
        documents = None
        if positions is not None:
            documents = documents_from_positions(positions).expand_as(batch.targets)
        window = self.config.diversity_window
        return repeating_tokens(batch.inputs["input_ids"], batch.targets, documents, window=window)[batch.counts]

    def _predicted(self, hidden: Tensor, head: Head, batch: Batch) -> TeacherTarget:
        """Build the target from the inputs of the teacher's head, `[B, T, U]` or `[B, S, U]`."""
        if batch.teacher_targets is None:
            return TeacherTarget(hidden[batch.counts], head, self.divergence, self.config.temperature)
        rows, columns, has_partner = partners(batch.counts, batch.teacher_targets != IGNORED)
        return TeacherTarget(hidden[rows, columns], head, self.divergence, self.config.temperature, has_partner, True)

    def _stored(self, batch: Batch) -> Target | None:
        """Build the target from the stored signals of a batch, or return `None` in an evaluation without signals."""
        columns = {name: tensor[batch.counts] for name, tensor in batch.signals.items()}
        if not columns:
            if torch.is_grad_enabled():
                raise ValueError(
                    "expected the stored signals of a training batch, got a batch without signals; train on the "
                    "train_dataset that the trainer was built with"
                )
            return None
        if "entropy" in columns:
            return StoredSamples(columns["tokens"], columns["entropy"], self.stored_vocabulary)
        log = torch.cat([columns["log_probabilities"], columns["log_rest"][:, None]], dim=1)
        return StoredTop(columns["tokens"], log, self.divergence, self.stored_vocabulary)


def partners(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair the i-th position that counts in a student's row with the i-th that counts in the teacher's row.

    Args:
        student (`[B, T]`, bool), teacher (`[B, S]`, bool): whether a position counts; `n` positions of the student do.

    Returns:
        row and column of the partner of each of the `n` positions, and whether it has one, `[n]` each (int64, int64,
        bool). The column is arbitrary where there is no partner.
    """
    rows = student.nonzero()[:, 0]
    rank = (student.cumsum(1) - 1)[student]
    order = (~teacher).byte().argsort(dim=1, stable=True)
    has_partner = rank < teacher.sum(1)[rows]
    return rows, order[rows, rank.clamp(max=teacher.shape[1] - 1)], has_partner
