"""One pass of student and teacher over a batch: who sees what, which tokens count, and the loss of each.

Legend: `B` rows of `T` tokens, `n` of which are predicted from and count.
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

ON_POLICY = "on_policy"  # key of batches that the student wrote itself


@dataclass
class Batch:
    """What a batch holds, told apart.

    Attributes:
        inputs: for the student's forward.
        targets (`[B, T]`, int64): the token to predict from each position, -100 where none counts.
        teacher_inputs: for a teacher with another tokenizer.
        teacher_targets (`[B, S]`, int64, *optional*): of its tokens.
        signals: stored predictions of the teacher, `[B, T, ...]`.
        is_on_policy: the student wrote it.
    """

    inputs: dict[str, Any]
    targets: Tensor
    teacher_inputs: dict[str, Tensor] = field(default_factory=dict)
    teacher_targets: Tensor | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)
    is_on_policy: bool = False

    @classmethod
    def split(cls, inputs: dict[str, Any], label_name: str) -> "Batch":
        """Take a collator's batch apart.

        Raises:
            ValueError: no labels.
        """
        inputs = dict(inputs)
        is_on_policy = bool(inputs.pop(ON_POLICY, False))
        teacher = {k.removeprefix("teacher_"): inputs.pop(k) for k in list(inputs) if k.startswith("teacher_")}
        labels, shifted = inputs.pop(label_name, None), inputs.pop("shift_labels", None)
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
        """`[B, T]`, bool: positions whose prediction counts."""
        return self.targets != IGNORED


@dataclass
class BatchLosses:
    """`loss`: weighted sum over tokens, differentiable; `terms`: each unweighted, `[n]`, without gradient."""

    loss: Tensor
    terms: dict[str, Tensor]


class DistillationForward:
    """Runs the student, and inside its forward the teacher, up to the heads; there the loss is computed.

    The teacher runs at the moment when the student's head is due, so that both heads are whole where weights are
    sharded, and no logits of more than a chunk of tokens exist.

    Args:
        config ([`DistillationConfig`]): weights.
        teacher (`nn.Module`, *optional*): placed and frozen; without one, batches hold its stored predictions.
        teacher_model (`PreTrainedModel`, *optional*): the same, unwrapped.
        matching (`nn.Module`, *optional*): a [`StateMatching`], perhaps wrapped.
        stored_vocabulary (`int`, *optional*): number of leading tokens that stored predictions are about.
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
            model (`nn.Module`): the student, as wrapped for training; called once.
            student (`PreTrainedModel`): the same, unwrapped.
            student_head ([`HeadReplacement`]): of it.
            batch ([`Batch`]): on the student's device.
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
        """Call a model without logits, and keep the states that are to be matched."""
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
        """Compute the loss from what the student's head would see, `[B, T, H]`."""
        counts = batch.counts
        candidates = self._candidates(batch)

        def loss_against(target: Target | None) -> Tensor:
            is_plain = target is None  # evaluation, where only training data has stored signals
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

        teacher, teacher_head = self.teacher, self.teacher_head
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
        """Raise a `ValueError` unless the teacher's own tokens are there where, and only where, they are compared."""
        is_universal = "universal" in self.config.divergences
        if is_universal == bool(batch.teacher_inputs) == (batch.teacher_targets is not None):
            return
        expected = "teacher_input_ids, teacher_attention_mask and teacher_labels" if is_universal else "none"
        raise ValueError(
            'divergence="universal" is for a teacher with another tokenizer, the others for the same: got '
            f"divergence={self.config.divergence!r}, expected {expected} of the teacher's tokens in the batch, got "
            f"{sorted(batch.teacher_inputs)}; change the data set and its collator, or the divergence"
        )

    def _candidates(self, batch: Batch) -> Tensor | None:
        """Return the tokens that would go on with a repetition, `[n, C]`, if they are to be discouraged."""
        if not self.config.diversity_weight or batch.is_on_policy:  # its labels are the student's own repetitions
            return None
        positions = batch.inputs.get("position_ids")
        documents = None
        if positions is not None:
            documents = documents_from_positions(positions).expand_as(batch.targets)
        window = self.config.diversity_window
        return repeating_tokens(batch.inputs["input_ids"], batch.targets, documents, window=window)[batch.counts]

    def _predicted(self, hidden: Tensor, head: Head, batch: Batch) -> TeacherTarget:
        """Describe the teacher's predictions for the tokens that count, from what its head would see."""
        if batch.teacher_targets is None:
            return TeacherTarget(hidden[batch.counts], head, self.divergence, self.config.temperature)
        rows, columns, has_partner = partners(batch.counts, batch.teacher_targets != IGNORED)
        return TeacherTarget(hidden[rows, columns], head, self.divergence, self.config.temperature, has_partner, True)

    def _stored(self, batch: Batch) -> Target | None:
        """Describe stored predictions for the tokens that count, if the batch has any."""
        columns = {name: tensor[batch.counts] for name, tensor in batch.signals.items()}
        if not columns:
            if torch.is_grad_enabled():
                raise ValueError(
                    "expected the stored signals of a training batch, got a batch without; the training data must be "
                    "the train_dataset that the trainer was made with"
                )
            return None
        if "entropy" in columns:
            return StoredSamples(columns["tokens"], columns["entropy"], self.stored_vocabulary)
        log = torch.cat([columns["log_probabilities"], columns["log_rest"][:, None]], dim=1)
        return StoredTop(columns["tokens"], log, self.divergence, self.stored_vocabulary)


def partners(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair the i-th token that counts in a row with the i-th that counts in the teacher's row.

    Args:
        student (`[B, T]`, bool), teacher (`[B, S]`, bool): positions that count.

    Returns:
        row and column of each partner, and whether there is one, `[n]` each.
    """
    rows = student.nonzero()[:, 0]
    rank = (student.cumsum(1) - 1)[student]
    order = (~teacher).byte().argsort(dim=1, stable=True)
    has_partner = rank < teacher.sum(1)[rows]
    return rows, order[rows, rank.clamp(max=teacher.shape[1] - 1)], has_partner
