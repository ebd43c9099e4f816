"""A `Trainer` for distillation: it connects the training loop of transformers with the parts of this package.

Legend: `B` rows of `T` tokens, `n` positions of a batch whose predictions count.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.modeling_outputs import CausalLMOutput

from ..repetition.unlikelihood_callback import SequenceUnlikelihoodCallback
from ..training.finite_gradients import FiniteGradientsCallback
from ..training.generation import continue_prompts
from ..training.seeds import step_seed
from .config import DistillationConfig
from .forward import ON_POLICY, Batch, BatchLosses, DistillationForward
from .head_replacement import HeadReplacement
from .layer_matching import StateMatching
from .on_policy import is_on_policy_step, prompts_of
from .stored_signals import ROW, SignalCollator, StoredSignals, is_signals, with_rows
from .teachers import (
    head_size,
    load_teacher,
    load_tokenizer,
    place_teacher,
    refuse_other_vocabulary,
    refuse_shared_parameters,
    refuse_smaller_vocabulary,
    refuse_training_mode,
)

# columns of a data set that the Trainer must not drop
TEACHER_COLUMNS = ("teacher_input_ids", "teacher_attention_mask", "teacher_position_ids", "teacher_labels", ROW)


class DistillationTrainer(Trainer):
    """Train a student to predict what a teacher predicts (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    All features of [`~transformers.Trainer`] keep working. Beside `loss` it logs the mean per token of each term of the
    loss: `divergence` (times temperature squared), `cross_entropy` and `diversity` in nats, `hidden_states` and
    `attention_outputs` as ratios. Evaluation reports the terms with the prefix `eval_`. `eval_cross_entropy` is what
    plain training calls `eval_loss`, as an exact mean per token. Gradients that are infinite or NaN stop the training
    ([`~whisper_hf.FiniteGradientsCallback`]).

    Args:
        model (`PreTrainedModel`, perhaps wrapped by peft): the student.
        teacher (`PreTrainedModel`, `str` or `Path`): a model, the path or Hub id of a model, or a folder of stored
            signals (`whisper-hf cache-signals`). A model may be quantized; it is frozen and moved to the student's
            device.
        args ([`DistillationConfig`]): the arguments of the Trainer and of the losses.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the teacher's tokenizer, which is compared
            with `processing_class`. By default it is loaded from the teacher's folder or Hub id.
        kwargs: the other arguments of [`~transformers.Trainer`]: `train_dataset`, `data_collator`, `processing_class`,
            ... Labels of -100 do not count. With `divergence="universal"`, batches also hold `teacher_input_ids`,
            `teacher_attention_mask` and `teacher_labels`: the same text in the teacher's tokens.

    Raises:
        ValueError: a combination that is impossible, with its remedy: different tokenizers without the universal
            divergence, signals of other data, a teacher in training mode or with parameters of the student, ...
    """

    loss_is_scaled_for_ga = True
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teacher: PreTrainedModel | str | Path | None = None,
        args: DistillationConfig | None = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if teacher is None:
            raise ValueError("a teacher is needed: pass a model, a path, a Hub id, or a folder of stored signals")
        if not isinstance(args, DistillationConfig):
            raise ValueError(
                f"args must be a DistillationConfig, got {type(args).__name__}; DistillationConfig takes all arguments "
                "of TrainingArguments"
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the distillation loss; use the stock Trainer with it")
        self.signals = StoredSignals(teacher) if is_signals(teacher) else None
        if self.signals is not None and train_dataset is not None:
            tokenizer = teacher_processing_class or kwargs.get("processing_class")
            numbered = with_rows(train_dataset)
            self.signals.refuse_other(train_dataset, tokenizer, args.temperature)
            train_dataset = numbered
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        if not any(isinstance(callback, FiniteGradientsCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(FiniteGradientsCallback())
        if self.args.n_gpu > 1:
            raise ValueError(
                f"distillation needs one GPU per process, got DataParallel over {self.args.n_gpu} GPUs; start with "
                "`accelerate launch`"
            )
        # the loss is computed here, so it does not matter what the model's own loss accepts
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.teacher: Any = None
        self._student_head: HeadReplacement | None = None
        self._sums: dict[str, Tensor] = {}
        self._eval_rows: list[Tensor] = []
        self._eval_terms: list[str] = []
        self._prepare_teacher(teacher, teacher_processing_class)

    # --- setting up ---

    def _prepare_teacher(self, teacher: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Load, check and place the teacher or its stored signals, and build the matching of states."""
        matching = None
        wrapped_matching = None
        self._refuse_combinations()
        if self.signals is not None:
            self.data_collator: Any = SignalCollator(self.data_collator, self.signals, self._label_name)
            refuse_smaller_vocabulary(head_size(self.model), self.signals.manifest.vocabulary)
        else:
            self.teacher = load_teacher(teacher, self.args.teacher_init_kwargs)
            refuse_shared_parameters(self.teacher, self.model, [])
            self.teacher.requires_grad_(False)
            if "universal" not in self.args.divergences:
                sizes = head_size(self.model), head_size(self.teacher)
                refuse_other_vocabulary(sizes, self.processing_class, tokenizer or load_tokenizer(teacher))
            if self.args.state_kinds:
                matching, wrapped_matching = self._build_matching()
        placed = None
        if self.teacher is not None:
            placed = place_teacher(self.teacher, self.accelerator, self.args.shard_teacher)
        self.matching = matching
        stored = None if self.signals is None else self.signals.manifest.vocabulary
        self._forward = DistillationForward(self.args, placed, self.teacher, wrapped_matching, stored)

    def _refuse_combinations(self) -> None:
        """Raise a `ValueError` for options that exclude each other."""
        args = self.args
        stored = self.signals
        universal = "universal" in args.divergences
        needs_teacher_model = args.on_policy_fraction or args.state_kinds
        others = "on-policy text, hidden states or attention outputs"
        for refused, what, excluded in (
            (stored and (needs_teacher_model or universal), "stored signals", f'{others}, or divergence="universal"'),
            (universal and needs_teacher_model, 'divergence="universal"', others),
        ):
            if refused:
                raise ValueError(
                    f"{what} cannot be combined with {excluded}, got on_policy_fraction={args.on_policy_fraction}, "
                    f"states {args.state_kinds} and divergence={args.divergence!r}; use a teacher with the student's "
                    "tokenizer, as a model"
                )
        if stored and stored.manifest.kind == "samples" and set(args.divergences) != {"forward_kl"}:
            raise ValueError(
                f'sampled signals are unbiased for "forward_kl" alone, got divergence={args.divergences}; store the '
                "likeliest tokens instead (`whisper-hf cache-signals --top-k`)"
            )

    def _build_matching(self) -> tuple[StateMatching, nn.Module]:
        """Build the matching of states, and a wrapper of it that averages gradients over processes if it needs one."""
        configs = self.model.config, self.teacher.config
        matching = StateMatching(*configs, self.args.layer_pairs, self.args.state_kinds)
        matching.to(self.args.device)
        if not list(matching.parameters()):
            return matching, matching
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"student and teacher have hidden sizes {self.model.config.hidden_size} and "
                f"{self.teacher.config.hidden_size}, expected equal sizes under FSDP and DeepSpeed, which cannot train "
                "the projections between them; use DDP, or a student as wide as the teacher"
            )
        return matching, self.accelerator.prepare_model(matching)

    def _set_signature_columns_if_needed(self) -> None:
        """Add the teacher's columns to the columns of a data set that the Trainer keeps."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or ()), *TEACHER_COLUMNS]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of the student and of the projections of its states.

        Raises:
            ValueError: an optimizer that holds parameters of the teacher.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.matching is not None and list(self.matching.parameters()):
            optimizer.add_param_group({"params": list(self.matching.parameters())})
        if self.teacher is not None:
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            refuse_shared_parameters(self.teacher, self.model, trained)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimizer's state, and with it the projections of the matching."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.matching is not None and self.args.should_save:
            self.matching.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's state, and with it the projections of the matching."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.matching is not None and checkpoint is not None:
            self.matching.load(checkpoint)

    # --- training ---

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collect the batches of an optimizer step, and in on-policy steps let the student rewrite them.

        Returns:
            the batches, and the number of their labels, or `None` where the Trainer does not count them.

        Raises:
            ValueError: a step without any label.
        """
        if self.matching is not None:
            self.matching.zero_grad()  # the Trainer clears the gradients of the model only
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and is_on_policy_step(self.args.on_policy_fraction, self.args.seed, self.state.global_step):
            with torch.random.fork_rng():  # samples depend on the number of the step only, so resuming changes nothing
                torch.manual_seed(
                    step_seed(self.args.seed, self.state.global_step, "student's text", self.args.process_index)
                )
                batches = [self._write_batch(batch) for batch in batches]
            count = self._get_num_items_in_batch(batches, device)
        if count is not None and not count:
            raise ValueError("all labels of a step are masked (-100), expected some tokens to learn; check the labels")
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count the labels of the batches of a step, under any key; the Trainer itself counts only `labels`."""
        name = self._label_name
        named = [{**batch, "labels": batch[name]} if name in batch else batch for batch in batch_samples]
        return super()._get_num_items_in_batch(named, device)

    def _write_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Let the student continue the prompts of a batch, and return a batch of its text."""
        batch = self._prepare_inputs(batch)
        student = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        pad = getattr(self.processing_class, "pad_token_id", None)
        pad = student.generation_config.pad_token_id if pad is None else pad
        shown = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        prompts = prompts_of(
            batch["input_ids"], shown, batch[self._label_name], self.args.on_policy_prompt_tokens, pad or 0
        )
        with self.compute_loss_context_manager():
            written = continue_prompts(
                student,
                *prompts,
                self.args.on_policy_max_new_tokens,
                self.args.on_policy_temperature,
                pad_token_id=pad or 0,
                synced_gpus=self.is_fsdp_enabled or self.is_deepspeed_enabled,
            )
        return {**written, self._label_name: written["labels"], ON_POLICY: True}

    @property
    def _label_name(self) -> str:
        """The key of the labels in a batch."""
        return self.label_names[0] if self.label_names else "labels"

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch: the sum over its tokens, divided by the number of tokens of the optimizer step.

        Args:
            model (`nn.Module`): the student, as wrapped for training.
            inputs (mapping from `str` to tensors): a collated batch, with labels `[B, T]`.
            return_outputs (`bool`): whether to return logits, too; this costs a second forward pass.
            num_items_in_batch (`int` or 0-dim tensor, *optional*): the number of labels of the whole optimizer step;
                by default the number of labels of the batch.

        Returns:
            the loss (scalar), and with `return_outputs` an output with `logits`, `[B, T, V]`.
        """
        if torch.is_grad_enabled():
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, SequenceUnlikelihoodCallback):  # it needs the head, which is replaced below
                    callback.join(self.model, inputs)
        batch = Batch.split(inputs, self._label_name)
        losses = self._losses(model, batch)
        self._record(losses, batch, is_training=torch.is_grad_enabled())
        count = batch.counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = losses.loss / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if not return_outputs:
            return loss
        return loss, CausalLMOutput(logits=model(**batch.inputs, use_cache=False).logits)

    def _losses(self, model: nn.Module, batch: Batch) -> BatchLosses:
        """Run student and teacher over a batch, and compute its losses."""
        if self.teacher is not None:
            refuse_training_mode(self.teacher)
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if self._student_head is None or self._student_head.module is not student.get_output_embeddings():
            self._student_head = HeadReplacement(student)
        return self._forward(model, student, self._student_head, batch)

    # --- reporting ---

    def _record(self, losses: BatchLosses, batch: Batch, is_training: bool) -> None:
        """Add the terms of a batch to the sums for the log, or keep them per row for the evaluation."""
        if is_training:
            for name, values in losses.terms.items():
                pair = torch.stack([values.sum(), values.new_tensor(len(values))])
                self._sums[name] = self._sums[name] + pair if name in self._sums else pair
            return
        row = batch.counts.nonzero()[:, 0]
        zeros = losses.loss.new_zeros(len(batch.targets))
        columns = [zeros.index_add(0, row, values.to(zeros.dtype)) for values in losses.terms.values()]
        columns.append(zeros.index_add(0, row, torch.ones_like(row, dtype=zeros.dtype)))
        self._eval_terms = list(losses.terms)
        self._eval_rows.append(self.accelerator.gather_for_metrics(torch.stack(columns, dim=1)).cpu())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values, and in training also the mean of each term of the loss since the last log.

        The mean is over all tokens, steps and processes.
        """
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[name].double() for name in names]), "sum")
            logs |= {name: (total / count).item() for name, (total, count) in zip(names, sums, strict=True) if count}
            self._sums.clear()
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate a batch, and compute logits only on demand.

        Returns:
            the loss, logits and labels. Logits and labels are `None` with `prediction_loss_only`.
        """
        if not prediction_loss_only or self._label_name not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate a data set, and report each term of the loss as a mean over its tokens.

        The means do not depend on the size and padding of batches.
        """
        self._eval_rows = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_rows:
            *sums, count = torch.cat(self._eval_rows).double().sum(0).tolist()
            means = {name: total / max(count, 1) for name, total in zip(self._eval_terms, sums, strict=True)}
            output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
            weights = {name: getattr(self.args, f"{name}_weight") for name in means}
            if "divergence" not in means:  # stored signals cover the training data only, so this is plain evaluation
                weights = {"cross_entropy": 1.0}
            output.metrics[f"{metric_key_prefix}_loss"] = sum(weights[name] * means[name] for name in weights)
        return output
