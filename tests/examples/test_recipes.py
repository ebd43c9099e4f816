"""The recipes make models of a tiny teacher, go on after an interruption, and what is measured fills a card."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from examples import translate
from examples.recipes import card, corpus, measure, recipe, translation, whisper_lm_135m, whisper_lm_mini
from examples.support import long_texts
from whisper_hf import SequenceUnlikelihoodCallback
from whisper_hf.cards.results import load_results

from ..conftest import ROOT, SIZES

CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))
TEXT = [ROOT / "README.md", ROOT / "whisper_hf" / "objectives"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: Any) -> Path:
    """A tiny Llama of four layers with a tokenizer that loses nothing."""
    folder = tmp_path_factory.mktemp("teacher")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    # bitsandbytes rounds in groups of 64
    sizes = {**SIZES, "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def run(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs a script, as from a command line."""

    def main(script: Any, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(Path(script.__file__)), *map(str, arguments)])
        script.main()

    return main


def short(teacher: Path, output: Path, **more: object) -> list[object]:
    """Return the arguments of a recipe that takes a few seconds."""
    given = {"teacher": teacher, "output_dir": output, "max_steps": 4, "row_tokens": 384, "save_steps": 2, **more}
    return [part for name, value in given.items() for part in (f"--{name}", value)] + ["--train_data", *TEXT]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


class Interruption(TrainerCallback):
    """What a user does in the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


class Loops(SequenceUnlikelihoodCallback):
    """The callback of the recipe, on texts that are short enough for tiny rows."""

    def __init__(self, every: int) -> None:
        super().__init__(every // 8, rows=2, prefix_tokens=8, new_tokens=16)


@pytest.fixture(scope="module")
def mini(teacher: Path, tmp_path_factory: Any) -> Path:
    """A student of the tiny teacher with all that belongs to it, made in two runs."""
    output, patch = tmp_path_factory.mktemp("made") / "tiny-mini", pytest.MonkeyPatch()
    sizes = {"num_hidden_layers": 2, "intermediate_size": 64, "recovery_steps": 2}
    patch.setattr(sys, "argv", ["recipe.py", *map(str, short(teacher, output, **sizes)), "--baselines"])
    patch.setattr(whisper_lm_mini, "SequenceUnlikelihoodCallback", Loops)
    patch.setattr(Loops, "on_step_end", Interruption.on_step_end)
    with pytest.raises(KeyboardInterrupt):
        whisper_lm_mini.main()
    assert sorted(path.name for path in output.iterdir()) == ["cut", "training"]  # and nothing half-written
    patch.setattr(Loops, "on_step_end", TrainerCallback.on_step_end)
    whisper_lm_mini.main()
    patch.undo()
    return output


def test_a_student_is_cut_taught_and_quantized(mini: Path, teacher: Path) -> None:
    before, after = AutoModelForCausalLM.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(mini / "model")
    layers = json.loads((mini / "cut" / "layers.json").read_text())
    assert after.config.num_hidden_layers == len(layers["kept"]) == 2
    assert after.num_parameters() < before.num_parameters() / 1.5
    assert after.config.sparse_attention.budget_blocks * after.config.sparse_attention.block_size == 1664
    assert after.dtype == torch.bfloat16
    state = json.loads((mini / "training" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Loops"]["attributes"]["times"] == 2
    assert {path.name for path in mini.iterdir()} >= {
        *(f"model-{form}{part}" for form in ("int8", "nf4") for part in ("", "-adapter")),
        "cut-without-teacher",
        "random-without-teacher",
    }
    cut, alone, random = (weights(mini / name) for name in ("cut", "cut-without-teacher", "random-without-teacher"))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(cut[name], before.state_dict()[name.replace("1", str(layers["kept"][1]))])
    drift = [(found[name] - cut[name]).float().norm().item() for found in (alone, random)]
    assert 0 < 5 * drift[0] < drift[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["model", "model-int8", "model-nf4"])
def test_what_is_loaded_computes_in_the_dtype_that_was_asked_for(mini: Path, form: str, dtype: torch.dtype) -> None:
    seen = set()
    model = recipe.load_in(dtype, mini / form)
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    assert model(torch.ones(1, 8, dtype=torch.int64)).logits.dtype == dtype
    assert seen == {dtype}
    computing = {getattr(module, "compute_dtype", None) for module in model.modules()} - {None}
    assert computing == ({dtype} if form == "model-nf4" else set())


def test_an_interrupted_run_ends_as_any_other(teacher: Path, tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    learn = whisper_lm_135m.learn
    monkeypatch.setattr(whisper_lm_135m, "quantized_forms", lambda *_: None)
    arguments = {"trained_blocks": 1, "row_tokens": 512}  # 304 tokens of them are seen
    monkeypatch.setattr(whisper_lm_135m, "learn", lambda *given: learn(*given, callbacks=[Interruption()]))
    with pytest.raises(KeyboardInterrupt):
        run(whisper_lm_135m, *short(teacher, tmp_path / "interrupted", **arguments))
    monkeypatch.setattr(whisper_lm_135m, "learn", learn)
    for name in ("interrupted", "whole"):
        run(whisper_lm_135m, *short(teacher, tmp_path / name, **arguments))
    before, interrupted = weights(teacher), weights(tmp_path / "interrupted" / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert all(torch.equal(weight, interrupted[name]) for name, weight in whole.state_dict().items())
    changed = {name for name, weight in whole.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".self_attn." in name}
    assert whole.config.sparse_attention.topk_blocks == 86  # and not the one block of training


def test_each_layer_imitates_what_its_successor_was_trained_to_read() -> None:
    assert whisper_lm_mini.imitated({"kept": [0, 2, 3], "of": 5}) == [(0, 1), (1, 2), (2, 4)]


def test_what_is_measured_fills_a_card(mini: Path, teacher: Path, tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    arguments = [mini, "--teacher", teacher, "--lengths", 512, 1024, "--windows", 2, "--prompts", 2, "--works", TEXT[0]]
    run(measure, *arguments, "--tasks", "size", "--models", "tiny-mini nf4")
    run(measure, *arguments)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"Line {i} says so\tLa línea {i} lo dice\n" for i in range(40)), encoding="utf-8")
    more = ["--", "--pairs", pairs, "--held_out", 16, "--max_new_tokens", 8]
    in_this_process = SimpleNamespace(run=lambda command, check: run(translate, *command[2:]))
    monkeypatch.setattr(translation, "subprocess", in_this_process)
    run(translation, mini, "--teacher", teacher, "--steps", 2, "--passages", 2, *more)
    columns = ["dense teacher", "tiny-mini", "tiny-mini int8", "tiny-mini nf4"]
    alone = {"tiny-mini int8 alone", "tiny-mini nf4 alone", "no teacher, random start", "no teacher, cut start"}
    more = {"perplexity": alone, "repetition": {*alone, "human text"}}
    records = {task: load_results(mini / "results" / f"{task}.json").records for task in card.TASKS}
    for task, found in records.items():
        assert {record.model for record in found} == {*columns} | more.get(task, set()), task
    assert list(dict.fromkeys(record.model for record in records["size"])) == columns  # though nf4 was first

    values = {(r.model, r.metric, r.settings.get("tokens")): r.value for r in records["perplexity"]}
    ids = long_texts.read_works(AutoTokenizer.from_pretrained(teacher), TEXT[:1])[TEXT[0].stem]
    model = AutoModelForCausalLM.from_pretrained(mini / "model").eval()
    starts = (0, len(ids) // 2)
    with torch.no_grad():
        rows = torch.stack([ids[start : start + 512] for start in starts])
        expected = model(rows, labels=rows).loss.exp().item()
    assert values["tiny-mini", "perplexity", 512] == pytest.approx(expected, rel=0.02)  # bfloat16, on some CPUs
    ratio = values["tiny-mini", "perplexity", 1024] / values["dense teacher", "perplexity", 1024]
    assert values["tiny-mini", "over the teacher's", 1024] == ratio
    sizes = {record.model: record.value for record in records["size"] if record.metric == "linear layers"}
    assert sizes["tiny-mini nf4"] < sizes["tiny-mini int8"] < sizes["dense teacher"]

    monkeypatch.setattr(measure.Subject, "load", None)  # all is known: nothing is loaded
    monkeypatch.setattr(translation, "tune", lambda *_: None)
    run(measure, *arguments)
    run(translation, mini, "--teacher", teacher)
    run(card, mini, tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert text == str(card.write_card(tmp_path / "card", "tiny-mini"))
    own = [value for (of, _, _), value in values.items() if of == "tiny-mini"]
    assert all((f"{value:,.0f}" if value >= 1000 else f"{value:.4g}") in text for value in own)
    sums = (tmp_path / "card" / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in sums][:2] == ["model/model.safetensors", "model-int8/model.safetensors"]
    assert len(sums) == 5


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_a_published_card_says_what_its_results_say(folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == str(card.write_card(folder, folder.name))


def test_rows_come_from_all_sources_alike(teacher: Path, tmp_path: Path, monkeypatch: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    (tmp_path / "folder").mkdir()
    for name, letter in (("folder/a.py", "a"), ("folder/b.txt", "b"), ("folder/c.bin", "c"), ("file.txt", "d")):
        (tmp_path / name).write_text(f"{letter} " * 200)
    streamed = [{"body": "e " * 30}] * 1000
    monkeypatch.setattr(corpus.datasets, "load_dataset", lambda name, **_: iter(streamed if name == "user/set" else ()))
    sources = [str(tmp_path / "folder"), str(tmp_path / "file.txt"), "user/set"]
    rows = corpus.read_rows(sources, tokenizer, 32, 11, "body")
    assert {len(row) for row in rows} == {32}
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    found = [{*text} - {" "} for text in texts]
    assert [sum(letters <= {*source} for letters in found) for source in ("ab", "d", "e")] == [4, 4, 3]
    assert {"a", "b"} == set().union(*(letters for letters in found if letters <= {"a", "b"}))
    assert (
        rows
        == corpus.read_rows(sources, tokenizer, 32, 11, "body")
        != corpus.read_rows(sources, tokenizer, 32, 11, "body", 1)
    )
    assert len(corpus.read_rows(sources[1:2], tokenizer, 32, 1000)) < 20  # all there is
    with pytest.raises(ValueError, match=r"file.txt must have 9999 tokens or more"):
        corpus.read_rows(sources[1:2], tokenizer, 9999, 1)


def test_facts_are_hidden_at_their_depth_and_asked_for(teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    prose = torch.full((1000,), tokenizer("x").input_ids[0])
    told = [long_texts.pass_key(0.25, 1), *long_texts.facts((0.5, 0.75), 2)]
    ids, answers = long_texts.hide(tokenizer, prose, told)
    assert {tokenizer.decode(ids[answer]).strip() for answer in answers} == {str(fact.key) for fact in told}
    text = tokenizer.decode(ids)
    assert [text.count(str(fact.key)) for fact in told] == [3, 2, 2]
    for fact in told:
        assert text.index(fact.text) == pytest.approx(fact.depth * 1000, abs=150)
        assert text.rindex(f"{fact.question} {fact.key}.") > text.rindex("xx")

    rows = [prose.tolist()] * 3
    asking = corpus.with_facts(rows, tokenizer)
    assert [len(row) for row in asking] == [1000] * 3
    assert len({tuple(row) for row in asking}) == 3
    assert all("What is the pass key? The pass key is" in tokenizer.decode(row) for row in asking)
    assert not any(name in tokenizer.decode(row) for name in long_texts.NAMES for row in asking)
