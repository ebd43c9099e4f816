"""`examples/translate.py` learns translations alone, keeps whole books from training, and scores as sacrebleu does."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import sacrebleu
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, TrainingArguments

from examples import translate
from examples.support import pairs as data
from whisper_hf import from_dense
from whisper_hf.cards.results import load_results

from ..conftest import ROOT, SIZES, SPARSE
from ..helpers.warm_processes import run_script

# verses, and how the last one begins; one of Jonah's 48 is missing in the file
EXPECTED = {
    "Ruth": (85, "And Obed begat Jesse"),
    "Esther": (167, "For Mordecai the Jew was next unto king"),
    "Jonah": (47, "And should not I spare Nineveh"),
    "James": (108, "Let him know, that he which converteth"),
}
JONAH = range(22300, 22600)  # verses around it: six times as many
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def verses() -> list[data.Pair]:
    """The shipped file."""
    return data.read_pairs(None, None, "train", [])


@pytest.fixture(scope="module")
def bytes_tokenizer(verses: list[data.Pair]) -> PreTrainedTokenizerFast:
    """A tokenizer that loses nothing of either language, padding on the left."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator((text for pair in verses[:300] for text in pair), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    fast.padding_side, fast.chat_template = "left", TEMPLATE
    return fast


@pytest.fixture
def checkpoint(tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama with that tokenizer."""
    sizes = {**SIZES, "vocab_size": len(bytes_tokenizer), "max_position_embeddings": 2048}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, eos_token_id=1, pad_token_id=0)).save_pretrained(
        tmp_path / "dense"
    )
    bytes_tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def around_jonah(tmp_path: Path, verses: list[data.Pair]) -> Path:
    """A file of Jonah and verses around it."""
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in verses[JONAH.start : JONAH.stop]), encoding="utf-8")
    return path


def arguments(checkpoint: Path, output: Path, *more: object) -> list[str]:
    """Return a command line for a run of seconds, with sequences several times longer than the budget."""
    line = ["--model", checkpoint, "--sparse_attention", json.dumps(SPARSE), "--output_dir", output, "--use_cpu"]
    line += ["--max_steps", 2, "--learning_rate", 0.01, "--save_steps", 2, "--logging_steps", 1]
    line += ["--eval_examples", 3, "--max_new_tokens", 8]
    return [str(item) for item in (*line, *more)]


def run(monkeypatch: pytest.MonkeyPatch, line: list[str]) -> dict:
    """Run the example in this process; return its translations and what they are worth."""
    monkeypatch.setattr(sys, "argv", ["translate.py", *line])
    translate.main()
    return known(Path(line[line.index("--output_dir") + 1]))


def known(folder: Path) -> dict:
    """Return the translations and scores in an output folder."""
    return json.loads((folder / "translations.json").read_text(encoding="utf-8"))


def losses(checkpoint: Path) -> list[float]:
    """Return the losses of all steps up to a checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("name", EXPECTED)
def test_books_begin_and_end_where_they_should(name: str, verses: list[data.Pair]) -> None:
    count, end = EXPECTED[name]
    place = data.book(verses, name)
    assert len(place) == count
    assert verses[place.start][0].startswith(data.BOOKS[name][0])
    assert verses[place[-1]][0].startswith(end)
    assert verses[place.stop][1].split()[0].isupper()  # a chapter of the Spanish text begins so


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_book_without_clear_ends_is_refused(name: str, which: int, verses: list[data.Pair]) -> None:
    beginning = [pair for pair in verses if pair[0].startswith(data.BOOKS[name][which])]
    for broken in ([pair for pair in verses if pair not in beginning], verses + beginning):
        with pytest.raises(ValueError, match=f"{name} needs one verse that begins with"):
            data.book(broken, name)


def test_held_out_books_are_nowhere_in_training(verses: list[data.Pair]) -> None:
    again = ("A new verse", verses[data.book(verses, "Ruth").start][1].upper() + "!")  # the same Spanish words
    train, held_out = data.split_pairs([*verses, again], None, True)
    assert [len(run) for run in held_out] == [count for count, _ in EXPECTED.values()]
    assert [len(run) for run in train] == [7126, 5486, 9652, 7685, 727]  # none of the passages crosses a gap
    learnt = "".join(data.plain(text) for run in train for pair in run for text in pair)
    hidden = [data.plain(text) for run in held_out for pair in run for text in pair]
    assert not [text for text in hidden if text in learnt]


def test_passages_follow_runs_and_lose_nothing(verses: list[data.Pair]) -> None:
    runs = [verses[:10], verses[20:23]]
    cut = data.passages(runs, 4)
    assert [source.count("\n") + 1 for source, _ in cut] == [4, 4, 2, 3]
    assert [line for source, _ in cut for line in source.split("\n")] == [source for part in runs for source, _ in part]
    assert data.passages(runs, 4, reverse=True) == [(target, source) for source, target in cut]
    assert data.spread([*range(10)], 4) == [0, 2, 5, 7]
    assert data.spread([*range(10)], 0) == data.spread([*range(10)], 99) == [*range(10)]


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_only_the_translation_and_its_end_are_learnt(template, bytes_tokenizer, verses, monkeypatch) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", template)
    task = translate.Task(bytes_tokenizer, "Spanish")
    pair = data.passages([verses[:3]], 3)[0]
    example = task.example(pair)
    learnt = [label for label in example["labels"] if label != -100]
    assert bytes_tokenizer.decode(learnt) == pair[1] + "<eos>"
    prompt = example["input_ids"][: -len(learnt)]
    assert prompt == task.prompt(pair[0])  # what translations are generated from
    assert bytes_tokenizer.decode(prompt).startswith(("<user>" if template else "") + "Translate into Spanish:\n\n")
    assert pair[0] in bytes_tokenizer.decode(prompt)
    assert example["labels"][: len(prompt)] == [-100] * len(prompt)


def test_scores_are_those_of_sacrebleu() -> None:
    hypotheses, references = ["El rey se levantó.", "Y dijo Dios: Sea la luz"], ["El rey se fué.", "Y dijo Dios: Sea."]
    found = translate.score(hypotheses, references)
    assert found["bleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert 10 < found["bleu"] < 100 == round(translate.score(references, references)["bleu"])


def test_translates_a_batch_as_it_does_each_passage(checkpoint: Path, tmp_path: Path, bytes_tokenizer, verses) -> None:
    model = from_dense(checkpoint, sparse_attention=SPARSE)
    task = translate.Task(bytes_tokenizer, "Spanish")
    sources = [source for size in (3, 1, 2) for source, _ in data.passages([verses[:size]], size)]
    together, alone = (TrainingArguments(tmp_path, per_device_eval_batch_size=n, use_cpu=True) for n in (3, 1))
    found = translate.translate(model, task, sources, together, 12)
    assert found == translate.translate(model, task, sources, alone, 12)
    assert len({*found}) == 3


def test_trains_resumes_and_saves_a_sparse_model(
    checkpoint: Path, around_jonah: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, count_calls
) -> None:
    output = tmp_path / "out"
    line = arguments(checkpoint, output, "--pairs", around_jonah, "--held_out", "Jonah")
    line += ["--resume_from_checkpoint", "last"]  # there is none yet
    done = run_script(ROOT / "examples" / "translate.py", line)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"64 examples of \d+ tokens, 100% of them longer than the budget", done.stdout)
    first, state = known(output), output / "checkpoint-2" / "trainer_state.json"
    begun = losses(output / "checkpoint-2")
    state.write_text(state.read_text().replace(str(begun[0]), "1234.5"))
    translated = count_calls(translate, "translate")
    line += ["--max_steps", "6"]
    again = run(monkeypatch, line)
    assert len(translated) == 1  # what the model could do before is known
    assert again["scores"]["before"] == first["scores"]["before"]
    assert again["scores"]["after"]["loss"] < first["scores"]["after"]["loss"] < first["scores"]["before"]["loss"]
    assert losses(output / "checkpoint-6")[:2] == [1234.5, begun[1]]  # and these steps were not repeated
    assert len(losses(output / "checkpoint-6")) == 6

    results = load_results(output / "translate.json")
    assert results.command == shlex.join(["python", "examples/translate.py", *line])
    assert {record.task for record in results.records} == {"translation from English into Spanish"}
    values = {(record.model, record.metric): record.value for record in results.records}
    references, hypotheses = ([row[name] for row in again["samples"]] for name in ("reference", "after"))
    assert values["dense, sparse, fine-tuned", "BLEU"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert values["dense, sparse, fine-tuned", "chrF"] == sacrebleu.corpus_chrf(hypotheses, [references]).score
    sources = [row["source"] for row in again["samples"]]
    assert values["the source copied", "chrF"] == sacrebleu.corpus_chrf(sources, [references]).score
    assert {*SPARSE.items(), ("steps", 6), ("held out", "Jonah")} <= {*results.records[0].settings.items()}
    table = [row.split()[0] for row in capsys.readouterr().out.splitlines()[-6:] if row]
    assert table[-5:] == ["------", "copy", "before", "after", "3"]

    saved = AutoModelForCausalLM.from_pretrained(output)
    assert (saved.config.model_type, saved.config.sparse_attention.budget_blocks) == ("whisper_lm", 3)
    task = translate.Task(AutoTokenizer.from_pretrained(output, padding_side="left"), "Spanish")
    assert translate.translate(saved, task, sources, TrainingArguments(tmp_path, use_cpu=True), 8) == hypotheses


def test_other_data_and_an_adapter(checkpoint: Path, tmp_path: Path, verses, monkeypatch, count_calls) -> None:
    folder, output = tmp_path / "data set", tmp_path / "out"
    folder.mkdir()
    rows = [json.dumps({"id": i, "translation": {"en": a, "es": b}}) for i, (a, b) in enumerate(verses[:60])]
    (folder / "train.jsonl").write_text("\n".join(rows))
    from_dense(checkpoint, sparse_attention=SPARSE).save_pretrained(tmp_path / "sparse")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "sparse")
    wider = {**SPARSE, "topk_blocks": 2}
    more = ["--pairs", folder, "--columns", "translation.en", "translation.es", "--held_out", 10, "--reverse"]
    more += ["--verses_per_example", 5, "--save", "adapter", "--sparse_attention", json.dumps(wider)]
    prepared = count_calls(translate, "prepare")
    found = run(monkeypatch, arguments(tmp_path / "sparse", output, *more))
    assert prepared[0][1].target_language == "English"
    assert len(found["samples"]) == 2
    assert found["samples"][0]["source"] == "\n".join(target for _, target in verses[50:55])
    record = load_results(output / "translate.json").records[0]
    assert (record.task, record.dataset) == ("translation from Spanish into English", "data set")
    assert {*wider.items(), ("examples to train on", 10), ("held out", "10")} <= {*record.settings.items()}
    assert (output / "adapter_model.safetensors").is_file()
    assert not (output / "model.safetensors").is_file()


def test_a_second_file_is_held_out(around_jonah: Path, tmp_path: Path, verses: list[data.Pair]) -> None:
    (tmp_path / "more.tsv").write_text("One\tUno\tby someone\n\tDos\n" + "\t".join(verses[JONAH.start + 5]) + "\n")
    pairs = data.read_pairs(str(around_jonah), None, "train", [])
    train, held_out = data.split_pairs(pairs, [str(tmp_path / "more.tsv")], False)
    assert held_out == [[("One", "Uno"), verses[JONAH.start + 5]]]
    assert [len(run) for run in train] == [5, 294]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--held_out", "Mark"], "must be books among Ruth, Esther, Jonah, James, a number or a file, got 'Mark'"),
        (["--held_out", "300"], "must be some of the 300 pairs, not all, got 300"),
        (["--held_out", "Ruth"], "Ruth needs one verse that begins with"),
        (["--held_out", "9", "--verses_per_example", "0"], "--verses_per_example must be at least 1, got 0"),
        (["--held_out", "9", "--verses_per_example", "60"], "at most 2048 tokens, got"),
        (["--held_out", "9", "--sparse_attention", "{16}"], "--sparse_attention must be JSON like"),
        (["--held_out", "9", "--sparse_attention", '{"size": 16}'], "size"),
        (["--pairs", str(ROOT / "LICENSE")], "must have source, tab, target on each line"),
        (["--pairs", "/no/such/file.tsv"], "/no/such/file.tsv"),
        (["--model", "/no/such/model"], "/no/such/model"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(more, words, checkpoint, around_jonah, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["translate.py", *arguments(checkpoint, tmp_path / "o", "--pairs", around_jonah, *more)]
    )
    with pytest.raises(SystemExit) as caught:
        translate.main()
    message = str(caught.value)
    assert message.startswith("translate.py: ")
    assert words in message
    assert "\n" not in message
    assert not (tmp_path / "o").exists()
