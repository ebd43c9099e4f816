"""`DiversityCallback`: its numbers are those of texts written by hand, and training does not notice it."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from whisper_hf import DistillationConfig, DistillationTrainer
from whisper_hf.repetition.metrics import distinct, looping_share, sequence_repetition
from whisper_hf.repetition.monitor_callback import DiversityCallback

from ..conftest import SIZES, VOCABULARY, tiny_model, tokens
from ..helpers.warm_processes import run_two_processes

PROMPT, NEW = 6, 12  # tokens
LENGTHS = {"prompt_tokens": PROMPT, "new_tokens": NEW}
HELD_OUT = tokens(5, PROMPT + NEW + 3).tolist()
PREFIXES = [row[:PROMPT] for row in HELD_OUT]
END = 2
MANY_ENDS = list(range(3, 20))  # so that continuations are of all lengths
METRICS = ("seq_rep_4", "looping_share", "distinct_2", "mean_tokens")
KEYS = {f"diversity/{kind}_{name}" for kind in ("greedy", "sampled", "data") for name in METRICS}


def dense_model(**overrides: Any) -> PreTrainedModel:
    """Return a tiny Llama."""
    set_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **special, "num_hidden_layers": 1, **overrides}))


def looping_model() -> PreTrainedModel:
    """Return a model that likes all tokens equally, so that greedy decoding always takes the first one, 0."""
    model = dense_model()
    model.lm_head.weight.data.zero_()
    return model


def trainer_of(folder: Path | str, model: PreTrainedModel | None = None, **options: Any) -> Trainer:
    """Return a stock trainer on random text."""
    names = ("train_dataset", "data_collator", "processing_class")
    own = {name: options.pop(name) for name in names if name in options}
    arguments = {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": 0.1,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    data = Dataset.from_dict({"input_ids": tokens(8, 24).tolist(), "labels": tokens(8, 24).tolist()})
    return Trainer(
        model=dense_model() if model is None else model,
        args=TrainingArguments(**{**arguments, **options}),
        **{"train_dataset": data, "data_collator": default_data_collator, **own},
    )


def with_callback(trainer: Trainer, held_out: Any = HELD_OUT, **options: Any) -> DiversityCallback:
    """Add a callback that measures at every step, two prefixes at a time."""
    callback = DiversityCallback(trainer, held_out, **{"every": 1, "batch_size": 2, "samples": 0, **LENGTHS, **options})
    trainer.add_callback(callback)
    return callback


def measure_once(trainer: Trainer, **options: Any) -> dict[str, float]:
    """Return what is logged before training."""
    with_callback(trainer, **options).on_train_begin(trainer.args, trainer.state, trainer.control)
    return logged(trainer)[0]


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """Return the entries of the log that are the callback's."""
    return [entry for entry in trainer.state.log_history if "diversity/data_mean_tokens" in entry]


def weights(model: PreTrainedModel) -> torch.Tensor:
    """Return all weights, `[n]`."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def continue_by_hand(model: PreTrainedModel, ends: list[int]) -> list[list[int]]:
    """Decode greedily, one prefix at a time and without a cache."""
    texts = []
    for prefix in PREFIXES:
        ids = list(prefix)
        for _ in range(NEW):
            following = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            if following in ends:
                break
            ids.append(following)
        texts.append(ids[PROMPT:])
    return texts


def values_of(kind: str, texts: list[list[int]]) -> dict[str, float]:
    """Return what should be logged for texts."""
    values = (
        sequence_repetition(texts, 4),
        looping_share(texts),
        distinct(texts, 2),
        sum(map(len, texts)) / len(texts),
    )
    return {f"diversity/{kind}_{name}": value for name, value in zip(METRICS, values, strict=True)}


# --- the numbers ---


@pytest.mark.parametrize("ends", [[END], MANY_ENDS], ids=["seldom", "often"])
@pytest.mark.parametrize("build", [dense_model, tiny_model])
def test_greedy_and_data_are_those_of_texts_by_hand(tmp_path, build, ends: list[int]) -> None:
    trainer = trainer_of(tmp_path, build())
    trainer.model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    texts = continue_by_hand(copy.deepcopy(trainer.model).eval(), ends)
    true = [row[PROMPT : PROMPT + NEW] for row in HELD_OUT]
    true = [row[: next((i for i, token in enumerate(row) if token in ends), NEW)] for row in true]
    if len(ends) > 1:
        assert {NEW} < {len(row) for row in texts + true}
    entry = measure_once(trainer)
    expected = values_of("greedy", texts) | values_of("data", true)
    assert {name: entry[name] for name in expected} == pytest.approx(expected)
    assert set(entry) >= KEYS


@pytest.mark.parametrize("options", [{"top_p": 1e-6}, {"temperature": 1e-4}], ids=["nucleus", "temperature"])
def test_sampling_of_one_token_is_greedy(tmp_path, options: dict) -> None:
    entry = measure_once(trainer_of(tmp_path), **options)
    assert [entry[f"diversity/sampled_{name}"] for name in METRICS] == pytest.approx(
        [entry[f"diversity/greedy_{name}"] for name in METRICS]
    )


def sampled_text(folder: Path, step: int = 0, **options: Any) -> list[list[int]]:
    """Return the continuations of one prefix, in three batches of one."""
    callback = with_callback(trainer_of(folder, **options), [HELD_OUT[0]] * 3, batch_size=1)
    torch.seed()  # whatever has happened before
    return callback._write(step)["sampled"]


def test_seed_step_and_batch_decide_what_is_sampled(tmp_path) -> None:
    first = sampled_text(tmp_path)
    assert first == sampled_text(tmp_path)
    others = [sampled_text(tmp_path, step=1)[0], sampled_text(tmp_path, seed=1)[0]]
    assert len({tuple(ids) for ids in (*first, *others)}) == 5


def test_no_top_k_of_the_library_cuts_the_nucleus(tmp_path) -> None:
    """Where the next token is always the same distribution, `generate` would take 50 of 120 tokens by default."""
    model = dense_model(eos_token_id=None)
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[1]
    callback = with_callback(trainer_of(tmp_path, model), top_p=1.0, temperature=100.0, new_tokens=15, rows=5)
    callback.prefixes *= 20
    written = callback._write(0)["sampled"]
    assert len({token for row in written for token in row}) > 100


def test_a_looping_model_is_found_out(tmp_path) -> None:
    entry = measure_once(trainer_of(tmp_path, looping_model()))
    assert entry["diversity/greedy_seq_rep_4"] == pytest.approx(1 - 1 / (NEW - 3))
    assert entry["diversity/greedy_looping_share"] == 1
    assert entry["diversity/greedy_distinct_2"] == pytest.approx(1 / (5 * (NEW - 1)))
    assert entry["diversity/sampled_looping_share"] == entry["diversity/data_looping_share"] == 0


def test_settings_of_the_model_do_not_hide_repetition(tmp_path) -> None:
    trainer = trainer_of(tmp_path, looping_model())
    settings = trainer.model.generation_config
    settings.update(repetition_penalty=2.0, no_repeat_ngram_size=2, min_length=50, suppress_tokens=[0], num_beams=3)
    before = settings.to_dict()
    assert measure_once(trainer)["diversity/greedy_looping_share"] == 1
    assert trainer.model.generation_config is settings
    assert settings.to_dict() == before


def test_a_model_that_stops_at_once_has_a_length_and_no_ratios(tmp_path) -> None:
    """And trains on."""
    model = looping_model()
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    trainer = trainer_of(tmp_path, model, learning_rate=0.0)
    with_callback(trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    for entry in logged(trainer):
        assert entry["diversity/greedy_mean_tokens"] == entry["diversity/sampled_mean_tokens"] == 0
        assert entry["diversity/greedy_looping_share"] == 0
        assert not {"diversity/greedy_seq_rep_4", "diversity/greedy_distinct_2"} & set(entry)


# --- when ---


class StopAt(TrainerCallback):
    """End training after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask the trainer to stop."""
        control.should_training_stop = state.global_step >= self.step


def test_schedule_includes_first_and_last_step_and_goes_on_after_resuming(tmp_path) -> None:
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", **options)
    with_callback(whole, every=2)
    whole.train()
    assert [entry["step"] for entry in logged(whole)] == [0, 2, 4, 5]
    assert [entry["step"] for entry in whole.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]

    for callback in (StopAt(3), None):
        part = trainer_of(tmp_path / "parts", **options)
        with_callback(part, every=2)
        if callback is not None:
            part.add_callback(callback)
        part.train(resume_from_checkpoint=callback is None)
    assert [entry["step"] for entry in logged(part)] == [0, 2, 4, 5]  # the stop itself came after the checkpoint of 3
    for mine, theirs in zip(logged(part), logged(whole), strict=True):
        assert {name: mine[name] for name in KEYS & set(mine)} == {name: theirs[name] for name in KEYS & set(theirs)}


# --- training does not notice ---


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "checkpointing", "bf16", "accumulation"],
)
def test_training_is_the_same_to_the_bit(tmp_path, options: dict) -> None:
    """With dropout, and with a cache in generation: after the prefix, tokens come one by one."""
    plain = trainer_of(tmp_path, dense_model(attention_dropout=0.5), **options)
    plain.train()
    watched = trainer_of(tmp_path, dense_model(attention_dropout=0.5), **options)
    with_callback(watched)
    lengths = []
    watched.model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: lengths.append(args[0].shape[1]) if not module.training else None
    )
    watched.train()
    assert torch.equal(weights(plain.model), weights(watched.model))
    assert not torch.equal(weights(plain.model), weights(dense_model()))
    assert set(lengths) == {PROMPT, 1}
    assert set(logged(watched)[-1]) >= KEYS


def test_modes_and_random_states_are_left_alone(tmp_path) -> None:
    """Also those of a part that is in evaluation mode alone."""
    trainer = trainer_of(tmp_path)
    trainer.model.train()
    trainer.model.model.layers[0].mlp.eval()
    modes = [module.training for module in trainer.model.modules()]
    state = torch.get_rng_state()
    measure_once(trainer)
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_of_peft_write(tmp_path) -> None:
    adapted = get_peft_model(dense_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    texts = continue_by_hand(copy.deepcopy(adapted).eval(), [END])
    assert texts != continue_by_hand(dense_model().eval(), [END])
    trainer = trainer_of(tmp_path, adapted)
    settings = adapted.generation_config
    with_callback(trainer)
    trainer.train()
    first = logged(trainer)[0]
    expected = values_of("greedy", texts)
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert adapted.get_base_model().generation_config is settings


def test_distillation_trainer_takes_it(tmp_path) -> None:
    args = trainer_of(tmp_path).args.to_dict()
    kept = ("output_dir", "optim", "max_steps", "logging_steps", "report_to", "use_cpu", "save_strategy")
    trainer = DistillationTrainer(
        dense_model(),
        dense_model(hidden_size=16).eval(),
        DistillationConfig(**{name: args[name] for name in kept}),
        train_dataset=trainer_of(tmp_path).train_dataset,
        data_collator=default_data_collator,
    )
    with_callback(trainer)
    trainer.train()
    assert [entry["step"] for entry in logged(trainer)] == [0, 1, 2]
    assert all("divergence" in entry for entry in trainer.state.log_history if "loss" in entry)


# --- held-out text and examples ---


def test_held_out_text_comes_in_many_forms(tmp_path) -> None:
    """Rows too short are left out, and padding is taken off."""
    rows = [HELD_OUT[0][: PROMPT + NEW - 1], *HELD_OUT]
    padding = [[0] * 4 + [1] * len(row) for row in rows]
    padded = Dataset.from_dict({"input_ids": [[0] * 4 + row for row in rows], "attention_mask": padding})
    dataset = Dataset.from_dict({"input_ids": rows, "other": ["x"] * len(rows)})
    forms = [rows, [torch.tensor(row) for row in rows], dataset, dataset.with_format("torch"), padded]
    for held_out in forms:
        callback = with_callback(trainer_of(tmp_path), held_out, rows=3)
        assert callback.prefixes == PREFIXES[:3]
        assert callback.continuations == [row[PROMPT : PROMPT + NEW] for row in HELD_OUT[:3]]


def test_examples_are_printed(tmp_path, tokenizer, capsys) -> None:
    measure_once(trainer_of(tmp_path, looping_model(), processing_class=tokenizer), samples=1)
    printed = capsys.readouterr().out.splitlines()[1:]  # after what is logged
    true = HELD_OUT[0][PROMPT : PROMPT + NEW]
    assert printed[0] == f"[diversity, step 0] {tokenizer.decode(PREFIXES[0])!r}"
    assert printed[1] == f"   greedy: {tokenizer.decode([0] * NEW)!r}"
    assert printed[2].startswith("  sampled: ")
    assert printed[3] == f"     data: {tokenizer.decode(true)!r}"
    assert len(printed) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an integer of 1 or more, got 0"),
        ({"rows": 0}, "rows must be"),
        ({"prompt_tokens": 0}, "prompt_tokens must be"),
        ({"new_tokens": 3}, "new_tokens must be an integer of 4 or more, got 3"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"samples": -1}, "samples must be"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"held_out": [HELD_OUT[0][:9]]}, "6 \\+ 12 tokens, got 9 at most"),
        ({"held_out": []}, "got 0 at most"),
        ({"held_out": [{"text": "It is"}]}, "got columns \\['text'\\]; tokenize it first"),
        ({"held_out": ["It is"]}, "got 'It is'; tokenize"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_callback(trainer_of(tmp_path), **options)


def test_a_model_that_cannot_generate_is_refused(tmp_path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.model = trainer.model.model
    with pytest.raises(ValueError, match=r"that can generate, .* got Trainer with the model LlamaModel"):
        with_callback(trainer)


# --- whether training teaches to stop ---


def warnings_of(trainer: Trainer, caplog) -> str:
    """Train, and return the warnings."""
    with_callback(trainer, rows=1)
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            trainer.train()
    finally:
        logging.getLogger("transformers").propagate = False
    return caplog.text


@pytest.mark.parametrize(
    ("pad", "is_ended", "options", "expected"),
    [
        ("<eos>", True, {}, 1),
        ("<eos>", True, {"label_smoothing_factor": 0.1}, 1),
        ("<pad>", True, {}, 0),
        ("<eos>", False, {}, 0),
    ],
    ids=["padding-is-end", "smoothed", "own-padding", "no-end"],
)
def test_labels_that_hide_the_end_of_text_are_warned_of_once(
    tokenizer, tmp_path, caplog, pad: str, is_ended: bool, options: dict, expected: int
) -> None:
    """In the first batch where a text ends (not the first one); each is of one row, padded by the usual collator."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = pad, "right"
    rows = [row[: 7 + number] + [END] * (is_ended and number > 2) for number, row in enumerate(tokens(6, 20).tolist())]
    trainer = trainer_of(
        tmp_path,
        max_steps=len(rows),
        per_device_train_batch_size=1,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=16),
        processing_class=tokenizer,
        **options,
    )
    text = warnings_of(trainer, caplog)
    assert text.count("the model does not learn to stop") == expected
    if expected:
        assert "(one of [2])" in text
        assert "(here 2)" in text


def test_ends_of_questions_need_not_be_learned(tmp_path, caplog) -> None:
    """They follow what is not a label either; the answer has been cut off."""
    question = [5, 6, 7, END]
    labels = [-100] * len(question) + [8] * 8
    data = {"input_ids": [question + [8] * 8] * 4, "labels": [labels] * 4, "attention_mask": [[1] * len(labels)] * 4}
    assert "learn to stop" not in warnings_of(trainer_of(tmp_path, train_dataset=Dataset.from_dict(data)), caplog)


# --- two processes ---


def trained(folder: str, batch_size: int) -> list[dict[str, float]]:
    """Train for a step and return what was logged: five prefixes are three batches, one too few for two processes."""
    model = dense_model(eos_token_id=MANY_ENDS)
    trainer = trainer_of(folder, model, max_steps=1, per_device_train_batch_size=batch_size, logging_steps=10)
    with_callback(trainer)
    trainer.train()
    return logged(trainer)


def sharded(folder: str, version: int) -> dict[str, float]:
    """Measure a model whose weights are shared among processes (FSDP), so that all have to step together."""
    trainer = trainer_of(folder, dense_model(eos_token_id=MANY_ENDS))
    if version == 1:
        policy = ModuleWrapPolicy({type(trainer.model.model.layers[0])})
        options = {"auto_wrap_policy": policy, "device_id": torch.device("cpu")}
        trainer.model = trainer.model_wrapped = FullyShardedDataParallel(trainer.model, **options)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for part in (*trainer.model.model.layers, trainer.model):
            fully_shard(part, mesh=mesh)
    trainer.is_fsdp_enabled = True
    return measure_once(trainer)


def test_two_processes_equal_one(tmp_path) -> None:
    run_two_processes(work, tmp_path)
    single = trained(str(tmp_path), 2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [entry["step"] for entry in found["trained"]] == [0, 1]
        for mine, theirs in zip((*single, single[0], single[0]), (*found["trained"], *found["sharded"]), strict=True):
            assert {name: theirs[name] for name in KEYS} == pytest.approx({name: mine[name] for name in KEYS})


def work(folder: str) -> None:
    """Train and measure, and write what each process has found."""
    found = {"trained": trained(folder, 1), "sharded": [sharded(folder, version) for version in (1, 2)]}
    (Path(folder) / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
