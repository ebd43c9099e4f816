"""The stock `Trainer` on real text, with sequences several times longer than the budget."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from whisper_hf import WhisperLMForCausalLM

from ..conftest import LENGTH, tiny_model


@pytest.fixture(scope="module")
def dataset(tokenizer, paragraphs) -> Dataset:
    """Return 40 real sequences of `LENGTH` tokens, the last eight for evaluation."""
    ids = tokenizer(" ".join(paragraphs))["input_ids"]
    rows = [ids[start : start + LENGTH] for start in range(0, 40 * LENGTH, LENGTH)]
    return Dataset.from_dict({"input_ids": rows}).train_test_split(test_size=8, shuffle=False)


def right_padding(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a copy of the tokenizer that pads on the right."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def train(tokenizer, dataset, folder, model: WhisperLMForCausalLM | None = None, **options: object) -> Trainer:
    """Return a stock trainer around a tiny model."""
    arguments = {
        "output_dir": str(folder),
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    return Trainer(
        model=model or tiny_model(initializer_range=0.02),
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        # left padding would make a padding token predict the first token of some rows, whatever the model
        data_collator=DataCollatorForLanguageModeling(right_padding(tokenizer), mlm=False),
    )


def test_loss_falls_and_evaluation_agrees(tokenizer, dataset, tmp_path) -> None:
    trainer = train(tokenizer, dataset, tmp_path, max_steps=24, per_device_eval_batch_size=4)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.3
    ids = torch.tensor(dataset["test"]["input_ids"])
    torch.testing.assert_close(trainer.model(ids, labels=ids).loss.item(), after, rtol=1e-4, atol=1e-4)


def test_gradient_accumulation_equals_one_big_batch(tokenizer, dataset, tmp_path) -> None:
    """Also where the micro-batches hold different numbers of tokens."""

    def shorten(row: dict, index: int) -> dict:
        return {"input_ids": row["input_ids"][: LENGTH - 13 * (index % 9)]}

    ragged = dataset.map(shorten, with_indices=True)
    histories, weights = [], []
    for batch_size, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "max_steps": 4}
        trainer = train(tokenizer, ragged, tmp_path, **options)
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


class StopAt(TrainerCallback):
    """End training after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask the trainer to stop."""
        control.should_training_stop = state.global_step >= self.step


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tokenizer, dataset, tmp_path) -> None:
    uninterrupted = train(tokenizer, dataset, tmp_path / "whole")
    uninterrupted.train()
    options = {"save_strategy": "steps", "save_steps": 4}
    interrupted = train(tokenizer, dataset, tmp_path / "parts", **options)
    interrupted.add_callback(StopAt(4))
    interrupted.train()
    assert interrupted.state.global_step == 4
    resumed = train(tokenizer, dataset, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for (name, whole), part in zip(uninterrupted.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(whole, part), name


def test_label_smoothing_shifts_the_labels(tokenizer, dataset, tmp_path) -> None:
    """With almost no smoothing the loss is the plain one; unshifted labels would give another."""
    losses = []
    for factor in (0.0, 1e-6):
        trainer = train(tokenizer, dataset, tmp_path, max_steps=1, label_smoothing_factor=factor)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}], ids=["checkpointing", "bf16"])
def test_memory_saving_options_train(tokenizer, dataset, tmp_path, options: dict) -> None:
    plain = train(tokenizer, dataset, tmp_path)
    saving = train(tokenizer, dataset, tmp_path, **options)
    plain.train()
    saving.train()
    first, second = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, saving))
    assert first == pytest.approx(second, rel=1e-5 if "gradient_checkpointing" in options else 2e-2)
