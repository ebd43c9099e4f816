"""The arguments of [`DistillationTrainer`]."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..objectives import Divergence, weighted_divergence


@dataclass
class DistillationConfig(TrainingArguments):
    """The arguments of distillation, in addition to [`~transformers.TrainingArguments`].

    The loss of a token is

        divergence_weight * temperature**2 * divergence + cross_entropy_weight * cross_entropy
            + diversity_weight * contrast + hidden_states_weight * distance + attention_outputs_weight * distance

    The first three terms are in nats, the distances are ratios.

    Args:
        divergence (`str` or mapping, defaults to `"forward_kl"`): a name in `whisper_hf.objectives.DIVERGENCES`, or
            the names and weights of several, such as `{"skewed_kl": 0.5, "reverse_kl": 0.5}` (JSON on a command line).
        divergence_weight (`float`, defaults to 1.0): the weight of the divergence.
        temperature (`float`, defaults to 1.0): the temperature of the softmax that the divergence compares, above 0.
        jensen_shannon_beta (`float`, defaults to 0.5): the teacher's share of the mixture in `jensen_shannon`, in
            (0, 1).
        skew_alpha (`float`, defaults to 0.1): the share of the other distribution in the mixture of `skewed_kl` and
            `skewed_reverse_kl`, in (0, 1).
        cross_entropy_weight (`float`, defaults to 0.0): the weight of the cross-entropy of the labels.
        diversity_weight (`float`, defaults to 0.0): the weight of the contrast between the true token and the tokens
            that would continue a repetition ([`~whisper_hf.objectives.repeating_tokens`]).
        diversity_window (`int`, defaults to 512): how far back to search for repetitions, in tokens.
        hidden_states_weight (`float`, defaults to 0.0): the weight of the distance between hidden states.
        attention_outputs_weight (`float`, defaults to 0.0): the weight of the distance between the outputs of attention
            layers.
        layer_map (list of pairs, *optional*): pairs of a student layer and the teacher layer that it imitates, counted
            from 0. By default every student layer imitates the teacher layer at the same relative depth.
        on_policy_fraction (`float`, defaults to 0.0): the share of optimizer steps that train on text that the student
            writes, in [0, 1].
        on_policy_prompt_tokens (`int`, *optional*): how many tokens of each example the student continues. By default
            it continues the tokens before the first label.
        on_policy_max_new_tokens (`int`, defaults to 128): how many tokens the student writes at most.
        on_policy_temperature (`float`, defaults to 1.0): the temperature of sampling; 0 decodes greedily.
        teacher_init_kwargs (`dict`, *optional*): options for loading a teacher by name: `dtype`, `revision`,
            `quantization_config`, ...
        shard_teacher (`bool`, defaults to `True`): shard the teacher if the student is sharded (FSDP 2, DeepSpeed
            ZeRO-3). If `False`, each process keeps the whole teacher, which needs more memory and less communication.
        chunk_tokens (`int`, *optional*): for how many tokens logits exist at once. The default suits the device.

    Raises:
        ValueError: a value outside its range, an unknown divergence, or an option of the Trainer that would bypass the
            loss.
    """

    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "teacher_init_kwargs")

    divergence: dict | str | None = field(
        default="forward_kl", metadata={"help": "name, or JSON object of names and weights"}
    )
    divergence_weight: float = field(default=1.0, metadata={"help": "weight of the divergence"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the compared softmax, above 0"})
    jensen_shannon_beta: float = field(default=0.5, metadata={"help": "teacher's share in jensen_shannon"})
    skew_alpha: float = field(default=0.1, metadata={"help": "share of the other distribution in skewed_*"})
    cross_entropy_weight: float = field(default=0.0, metadata={"help": "weight of the cross-entropy of the labels"})
    diversity_weight: float = field(default=0.0, metadata={"help": "weight of the contrast with repetitions"})
    diversity_window: int = field(default=512, metadata={"help": "tokens back to search for repetitions"})
    hidden_states_weight: float = field(default=0.0, metadata={"help": "weight of the distance of hidden states"})
    attention_outputs_weight: float = field(
        default=0.0, metadata={"help": "weight of the distance of attention outputs"}
    )
    layer_map: list | str | None = field(default=None, metadata={"help": "JSON list of [student layer, teacher layer]"})
    on_policy_fraction: float = field(default=0.0, metadata={"help": "share of steps on the student's own text"})
    on_policy_prompt_tokens: int | None = field(default=None, metadata={"help": "tokens of an example to continue"})
    on_policy_max_new_tokens: int = field(default=128, metadata={"help": "tokens that the student writes"})
    on_policy_temperature: float = field(default=1.0, metadata={"help": "temperature of sampling; 0 is greedy"})
    teacher_init_kwargs: dict | str | None = field(default=None, metadata={"help": "options for loading the teacher"})
    shard_teacher: bool = field(default=True, metadata={"help": "shard the teacher if the student is sharded"})
    chunk_tokens: int | None = field(default=None, metadata={"help": "for how many tokens logits exist at once"})

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
        """Raise a `ValueError` for a value outside its range, or for options that exclude each other."""
        weights = ("divergence_weight", "cross_entropy_weight", "hidden_states_weight", "attention_outputs_weight")
        for name in (*weights, "diversity_weight", "on_policy_temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}; 0 switches it off")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"there is nothing to learn: set one of {', '.join(weights)} above 0, got 0 for all")
        if self.on_policy_fraction and not self.divergence_weight:
            raise ValueError(
                "a student learns from the divergence alone on text that it writes, got on_policy_fraction="
                f"{self.on_policy_fraction} and divergence_weight=0; set divergence_weight above 0"
            )
        if "universal" in self.divergences and len(self.divergences) > 1:
            raise ValueError(
                f"universal compares other tokens than the other divergences do, got {self.divergences}; use it alone"
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
        """The names and weights of the divergences."""
        value = self.divergence
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = json.loads(value)
        return dict(value) if isinstance(value, Mapping) else {str(value): 1.0}

    @property
    def layer_pairs(self) -> list[tuple[int, int]] | None:
        """The pairs of a student layer and a teacher layer from `layer_map`, or `None` without it."""
        pairs = json.loads(self.layer_map) if isinstance(self.layer_map, str) else self.layer_map
        return None if pairs is None else [(int(student), int(teacher)) for student, teacher in pairs]

    @property
    def state_kinds(self) -> list[str]:
        """The kinds of states inside the models that are compared: `hidden_states`, `attention_outputs`, or both."""
        return [kind for kind in ("hidden_states", "attention_outputs") if getattr(self, f"{kind}_weight")]

    def weighted_divergence(self) -> Divergence:
        """Return the weighted sum of the divergences as a function of teacher and student distributions."""
        return weighted_divergence(self.divergences, self.jensen_shannon_beta, self.skew_alpha)
