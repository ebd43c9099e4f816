"""Arguments of [`DistillationTrainer`]."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..objectives import Divergence, weighted_divergence


@dataclass
class DistillationConfig(TrainingArguments):
    """[`~transformers.TrainingArguments`] and what is particular to distillation.

    The loss of a token is `divergence_weight * temperature**2 * divergence + cross_entropy_weight * cross-entropy +
    diversity_weight * contrast + hidden_states_weight * distance + attention_outputs_weight * distance`, in nats
    (distances: ratios).

    Args:
        divergence (`str` or mapping, defaults to `"forward_kl"`): name in `whisper_hf.objectives.DIVERGENCES`, or
            names and weights of several, such as `{"skewed_kl": 0.5, "reverse_kl": 0.5}` (as JSON on a command line).
        divergence_weight (`float`, defaults to 1.0): of the divergence.
        temperature (`float`, defaults to 1.0): of the softmax that the divergence compares; above 0.
        jensen_shannon_beta (`float`, defaults to 0.5): the teacher's share of the mixture, in (0, 1).
        skew_alpha (`float`, defaults to 0.1): how much of the other distribution the skewed divergences mix in, in
            (0, 1).
        cross_entropy_weight (`float`, defaults to 0.0): of the cross-entropy of the labels.
        diversity_weight (`float`, defaults to 0.0): of the contrast between the true token and those that would go on
            with a repetition ([`~whisper_hf.objectives.repeating_tokens`]).
        diversity_window (`int`, defaults to 512): how far back repetitions are looked for, in tokens.
        hidden_states_weight (`float`, defaults to 0.0): of the distance of hidden states, layer by layer.
        attention_outputs_weight (`float`, defaults to 0.0): of the distance of the attention layers' outputs.
        layer_map (list of pairs, *optional*): student layers and the teacher layers that they imitate, from 0; by
            default every student layer, spread evenly, last onto last.
        on_policy_fraction (`float`, defaults to 0.0): share of optimizer steps on the student's own continuations.
        on_policy_prompt_tokens (`int`, *optional*): tokens of each example to continue; by default those before the
            first label.
        on_policy_max_new_tokens (`int`, defaults to 128): length of continuations, in tokens.
        on_policy_temperature (`float`, defaults to 1.0): of sampling; 0 decodes greedily.
        teacher_init_kwargs (`dict`, *optional*): for loading a teacher by name: `dtype`, `revision`,
            `quantization_config`, ...
        shard_teacher (`bool`, defaults to `True`): where the student is sharded (FSDP 2, DeepSpeed ZeRO-3), shard the
            teacher too; else each process keeps all of it, which saves communication where memory allows.
        chunk_tokens (`int`, *optional*): tokens whose logits exist at once; by default as many as suit the device.

    Raises:
        ValueError: a value outside its range, an unknown divergence, or options of the Trainer that would bypass the
            loss.
    """

    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "teacher_init_kwargs")

    divergence: dict | str | None = field(
        default="forward_kl", metadata={"help": "name, or JSON object of names and weights"}
    )
    divergence_weight: float = field(default=1.0, metadata={"help": "weight of the divergence"})
    temperature: float = field(default=1.0, metadata={"help": "of the softmax that the divergence compares"})
    jensen_shannon_beta: float = field(default=0.5, metadata={"help": "the teacher's share of the mixture"})
    skew_alpha: float = field(default=0.1, metadata={"help": "share mixed in by the skewed divergences"})
    cross_entropy_weight: float = field(default=0.0, metadata={"help": "weight of the cross-entropy of the labels"})
    diversity_weight: float = field(default=0.0, metadata={"help": "weight of the contrast with repetitions"})
    diversity_window: int = field(default=512, metadata={"help": "tokens back in which repetitions are looked for"})
    hidden_states_weight: float = field(default=0.0, metadata={"help": "weight of the distance of hidden states"})
    attention_outputs_weight: float = field(default=0.0, metadata={"help": "weight of that of attention outputs"})
    layer_map: list | str | None = field(default=None, metadata={"help": "JSON list of [student layer, teacher layer]"})
    on_policy_fraction: float = field(default=0.0, metadata={"help": "share of steps on the student's own text"})
    on_policy_prompt_tokens: int | None = field(default=None, metadata={"help": "tokens of an example to continue"})
    on_policy_max_new_tokens: int = field(default=128, metadata={"help": "tokens that the student writes"})
    on_policy_temperature: float = field(default=1.0, metadata={"help": "of sampling; 0 decodes greedily"})
    teacher_init_kwargs: dict | str | None = field(default=None, metadata={"help": "for loading the teacher"})
    shard_teacher: bool = field(default=True, metadata={"help": "where the student is sharded, shard the teacher too"})
    chunk_tokens: int | None = field(default=None, metadata={"help": "tokens whose logits exist at once"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ranges()
        self.weighted_divergence()
        if self.label_smoothing_factor:
            raise ValueError(
                f"distillation has no label smoothing, got label_smoothing_factor={self.label_smoothing_factor}; the "
                "teacher's predictions are soft labels already, so set it to 0"
            )

    def _check_ranges(self) -> None:
        weights = ("divergence_weight", "cross_entropy_weight", "hidden_states_weight", "attention_outputs_weight")
        for name in (*weights, "diversity_weight", "on_policy_temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"there is nothing to learn: set one of {', '.join(weights)} above 0")
        if self.on_policy_fraction and not self.divergence_weight:
            raise ValueError(
                f"on its own text a student learns from the divergence alone, got on_policy_fraction="
                f"{self.on_policy_fraction} and divergence_weight=0; set divergence_weight above 0"
            )
        if "universal" in self.divergences and len(self.divergences) > 1:
            raise ValueError(
                f"universal compares other tokens than the others do, got {self.divergences}; use it alone"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction must lie between 0 and 1, got {self.on_policy_fraction}")
        for name in ("diversity_window", "on_policy_prompt_tokens", "on_policy_max_new_tokens", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def divergences(self) -> dict[str, float]:
        """Names and weights of the divergences."""
        value = self.divergence
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = json.loads(value)
        return dict(value) if isinstance(value, Mapping) else {str(value): 1.0}

    @property
    def layer_pairs(self) -> list[tuple[int, int]] | None:
        """Pairs of student and teacher layer, if given."""
        pairs = json.loads(self.layer_map) if isinstance(self.layer_map, str) else self.layer_map
        return None if pairs is None else [(int(student), int(teacher)) for student, teacher in pairs]

    @property
    def state_kinds(self) -> list[str]:
        """Which states inside the models are compared."""
        return [kind for kind in ("hidden_states", "attention_outputs") if getattr(self, f"{kind}_weight")]

    def weighted_divergence(self) -> Divergence:
        """Return the divergence as a function."""
        return weighted_divergence(self.divergences, self.jensen_shannon_beta, self.skew_alpha)
