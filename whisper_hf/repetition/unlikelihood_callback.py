"""A Trainer callback that trains a model not to repeat itself more often than people do in the text it writes.

Legend: `B` rows of `T` tokens, `R` prefixes of `P` tokens, which are continued by `L` tokens, `V` vocabulary.
"""

import inspect
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..model.labels import IGNORED, documents_from_positions
from ..model.repetition_loss import without_adapter
from ..objectives.unlikelihood import repeated_ngrams, sequence_unlikelihood
from ..training.generation import continue_prompts
from ..training.seeds import step_seed
from .metrics import sequence_repetition

logger = logging.get_logger(__name__)

HALVINGS = 4  # number of lengths to try, each half of the one before, if the documents of a batch are too short


class SequenceUnlikelihoodCallback(TrainerCallback, ExportableState):
    """Train against loops with any Trainer: every few steps, penalise repetition in continuations of the batch.

    The model continues prefixes of the batch greedily. The penalty is

        alpha * mean(-log(1 - p(x_t)))

    over the tokens `x_t` of n-grams that repeat within a continuation. Its gradient is added to the gradient of the
    step's loss. Welleck et al. 2019, https://arxiv.org/abs/1908.04319, whose steps replace other steps and never end.
    Here the penalty vanishes once the model repeats itself no more than people do:

        alpha = weight * max(0, 1 - human / own)

    `own` is the repetition (seq-rep-n) of the model's continuations, as a running mean. `human` is the repetition of
    the true continuations, as a mean over all of them.

    A prefix lies in one document and may begin anywhere. It is continued only where the true tokens have labels, so a
    prompt is never penalised. All processes generate in the same steps and agree on `alpha`. Resuming is exact.
    `loops_own`, `loops_human` and `loops_alpha` are logged with the loss.

    The model must be able to `generate`. DeepSpeed, FSDP version 1 and `nn.DataParallel` are not supported.

    Args:
        every (`int`): number of optimizer steps between two penalties. A penalty costs about as much as to generate `L`
            tokens.
        rows (`int`): `R`, the number of prefixes of each process.
        prefix_tokens, new_tokens (`int`): `P` and `L`. Both are halved while no document of the batch is long enough.
        ngram (`int`): number of tokens of an n-gram.
        weight (`float`): the weight of the penalty beside the loss per token. The default exceeds 1, because few steps
            have a penalty.
        memory (`float`): the share of the old value in each update of the running mean, in [0, 1).

    Raises:
        ValueError: a setting out of range; or, when training begins, a way of training that is not supported.
    """

    def __init__(
        self,
        every: int = 16,
        rows: int = 16,
        prefix_tokens: int = 32,
        new_tokens: int = 64,
        ngram: int = 4,
        weight: float = 4.0,
        memory: float = 0.9,
    ):
        counts = {"every": every, "rows": rows, "prefix_tokens": prefix_tokens, "ngram": ngram}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if new_tokens <= ngram or not weight > 0 or not 0 <= memory < 1:
            raise ValueError(
                f"expected new_tokens > ngram, weight > 0 and 0 <= memory < 1, got {new_tokens=}, {ngram=}, {weight=}, "
                f"{memory=}"
            )
        self.settings: dict[str, Any] = {**counts, "new_tokens": new_tokens, "weight": weight, "memory": memory}
        self.every = every
        self.rows = rows
        self.prefix_tokens = prefix_tokens
        self.new_tokens = new_tokens
        self.ngram = ngram
        self.weight = weight
        self.memory = memory
        self.times = 0
        self.own = 0.0
        self.human = 0.0
        self._generator = torch.Generator()
        self._is_due = False

    def state(self) -> dict[str, Any]:
        """Return the settings and the means that the Trainer saves in `trainer_state.json`."""
        return {"args": self.settings, "attributes": {"times": self.times, "own": self.own, "human": self.human}}

    @property
    def alpha(self) -> float:
        """The current weight of the penalty: 0 before the first continuation and where people repeat as much."""
        return self.weight * max(0.0, 1 - self.human / self.own) if self.own else 0.0

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the means from a checkpoint, and hook into the model's forward pass.

        Raises:
            ValueError: DeepSpeed, FSDP version 1 or `nn.DataParallel`.
        """
        model = kwargs["model"]
        if args.deepspeed_plugin or args.n_gpu > 1 or isinstance(model, FullyShardedDataParallel):
            several = f"{args.n_gpu} devices of one process" if args.n_gpu > 1 else "FSDP version 1"
            got = "DeepSpeed" if args.deepspeed_plugin else several
            raise ValueError(
                f"{type(self).__name__} needs one device, DDP or FSDP version 2, got {got}; start with `accelerate "
                "launch` and one of these"
            )
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        for name, value in (saved or {}).get("attributes", {}).items():  # the Trainer restores callbacks only on demand
            setattr(self, name, value)
        self._scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        # the hook runs before FSDP's own hook, which does not allow a forward pass within another
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the hook from the model."""
        self._hook.remove()

    def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide whether this step has a penalty, and seed the choice of its prefixes."""
        self._is_due = state.global_step % self.every == 0
        self._generator.manual_seed(step_seed(args.seed, state.global_step, "prefixes", args.process_index))

    def on_log(
        self, args: Arguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the means and `alpha` to the log of the loss."""
        if "loss" in logs:
            values = {"loops_own": self.own, "loops_human": self.human, "loops_alpha": self.alpha}
            logs.update(values)
            state.log_history[-1].update(values)

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: tuple, batch: dict[str, Any]) -> None:
        """Add the penalty before a forward pass in training."""
        if model.training and torch.is_grad_enabled():
            self.join(model, {"input_ids": args[0], **batch} if args else batch)

    def join(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Let the model continue prefixes of a batch, if a penalty is due, and add its gradient to the step's gradient.

        A hook calls it before each forward pass in training. A trainer with hooks of its own in the model calls it
        before these.

        Args:
            model (`nn.Module`): the model.
            batch (mapping from `str` to `[B, T]`): with `input_ids`, and perhaps `attention_mask`, `labels` and
                `position_ids`.

        Raises:
            ValueError: a batch without `input_ids`.
        """
        if not self._is_due:
            return
        self._is_due = False
        if batch.get("input_ids") is None:
            raise ValueError(
                f"{type(self).__name__} continues input_ids, got a batch of {sorted(batch)}; train on token ids"
            )
        prefixes, true = self._choose(batch)
        length = true.shape[1] or self.new_tokens
        shown = torch.ones_like(prefixes)
        own = continue_prompts(model, prefixes, shown, length, pad_token_id=0)
        self._measure(own["labels"][:, prefixes.shape[1] :], true)
        if not self.alpha:
            return
        targets = own["labels"][:, prefixes.shape[1] :]
        logits = _last_logits(model, own, targets.shape[1] + 1)[:, :-1]
        repeated = repeated_ngrams(targets, n=self.ngram).sum()
        alpha = self.alpha if true.shape[1] else 0.0
        penalty = alpha * sequence_unlikelihood(logits, targets, n=self.ngram).sum() / repeated.clamp(min=1)
        (penalty if self._scaler is None else self._scaler.scale(penalty)).backward()

    def _choose(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Choose prefixes in a batch at random.

        Returns:
            prefixes (`[R, P]`) and their true continuations (`[R, L]`), or `[1, 1]` and `[1, 0]` if no document is long
            enough.
        """
        ids = batch["input_ids"]
        shown = torch.ones_like(ids) if batch.get("attention_mask") is None else batch["attention_mask"]
        labels = ids.masked_fill(shown == 0, IGNORED) if batch.get("labels") is None else batch["labels"]
        documents = documents_of(ids, shown, batch.get("position_ids"))
        for halving in range(HALVINGS):
            prefix = max(self.prefix_tokens >> halving, 1)
            new = self.new_tokens >> halving
            row, start = places(labels, documents, prefix, new)
            if new > self.ngram and len(row):
                chosen = torch.randperm(len(row), generator=self._generator)[: self.rows].to(row.device)
                columns = start[chosen, None] + torch.arange(prefix + new, device=ids.device)
                return ids[row[chosen, None], columns].split([prefix, new], dim=1)
        logger.warning_once(
            f"{type(self).__name__} skips a batch without {prefix} tokens that {new} tokens with labels follow in the "
            "same document; make prefix_tokens and new_tokens smaller if your documents are short"
        )
        return ids[:1, :1], ids[:1, :0]  # one token to continue, because other processes may wait for this one

    def _measure(self, own: Tensor, true: Tensor) -> None:
        """Update the means of repetition with the continuations of all processes.

        Each pair of an own and a true continuation is cut to equal lengths, because repetition grows with length.

        Args:
            own (`[R, L]`, int64): the model's continuations; -100 after their end of text.
            true (`[R, L]`, int64): the true continuations.
        """
        pairs = [(mine[mine != IGNORED], theirs) for mine, theirs in zip(own, true, strict=True)]
        pairs = [(mine[: len(theirs)], theirs[: len(mine)]) for mine, theirs in pairs if len(mine) >= self.ngram]
        pairs = [pair for pair in pairs if len(pair[0]) >= self.ngram]
        sums = [sequence_repetition(texts, self.ngram) * len(pairs) for texts in zip(*pairs, strict=True)] or [0.0, 0.0]
        mine, theirs, count = reduce(torch.tensor([*sums, len(pairs)], device=own.device), "sum").tolist()
        if count:
            self.times += 1
            self.own += max(1 - self.memory, 1 / self.times) * (mine / count - self.own)
            self.human += (theirs / count - self.human) / self.times


def _last_logits(model: Any, batch: dict[str, Tensor], count: int) -> Tensor:
    """Compute the logits of the last `count` tokens, `[R, count, V]`, and of no other tokens if the model allows it."""
    base = without_adapter(model)
    accepts = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    options: dict[str, Any] = {"logits_to_keep": count} if accepts else {}
    shown = batch["attention_mask"]
    return model(batch["input_ids"], attention_mask=shown, use_cache=False, **options).logits[:, -count:]


def documents_of(ids: Tensor, shown: Tensor, position_ids: Tensor | None) -> Tensor:
    """Number the documents of each row, `[B, T]`, int64; a hidden token has the number -1.

    Args:
        ids, shown (`[B, T]`, int64): token ids and attention mask.
        position_ids (`[B, T]`, int64, *optional*): positions, which restart at each document; by default a row is one
            document.
    """
    documents = torch.zeros_like(ids) if position_ids is None else documents_from_positions(position_ids)
    return documents.masked_fill(shown == 0, -1)


def places(labels: Tensor, documents: Tensor, prefix: int, new: int) -> tuple[Tensor, Tensor]:
    """Find all places where `prefix` tokens are followed by `new` tokens with labels in the same document.

    Args:
        labels (`[B, T]`, int64): labels; -100 for a token without label.
        documents (`[B, T]`, int64): the number of each token's document, ascending; -1 for a hidden token.
        prefix, new (`int`): numbers of tokens.

    Returns:
        row and first column of each of `N` places, `[N]` each, int64.
    """
    starts = torch.arange(max(labels.shape[1] - prefix - new + 1, 0), device=labels.device)
    labelled = nn.functional.pad((labels != IGNORED).long().cumsum(1), (1, 0))
    fits = labelled[:, starts + prefix + new] - labelled[:, starts + prefix] == new
    first, last = documents[:, starts], documents[:, starts + prefix + new - 1]
    row, start = (fits & (first == last) & (first >= 0)).nonzero(as_tuple=True)
    return row, start
