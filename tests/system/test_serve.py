"""`whisper-hf serve` and `chat`: a real server in a process of its own, and a real OpenAI client."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen3Config

from whisper_hf import Int8CpuConfig, WhisperLMForCausalLM
from whisper_hf.__main__ import main

from ..conftest import LENGTH, ROOT, SIZES, SPARSE, tiny_model, tokens

openai = pytest.importorskip("openai", reason="serving needs more packages: pip install 'whisper-hf[serving]'")
for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason="serving needs more packages: pip install 'whisper-hf[serving]'")
serving = pytest.importorskip("whisper_hf.serving")

NEW = 8
SENTENCES = "The general was silent, and Catherine dared not ask. "
ANSWERED = 60  # seconds that anything may take


def conversation(*paragraphs: str) -> list[dict]:
    """Return messages of a user and an assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(paragraphs)]


def saved(folder: Path, model, tokenizer) -> str:
    """Save a model with its tokenizer, whose template then refuses a role that it does not know."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuse + tokenizer.chat_template)
    return str(folder)


@contextmanager
def started(*arguments: str, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen]:
    """Start a command in a session of its own, and leave none of its processes behind."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-u", "-m", "whisper_hf", *arguments]
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def read_until(process: subprocess.Popen, pattern: str) -> re.Match:
    """Read what a process writes until it matches."""
    text = ""
    for line in iter(process.stdout.readline, ""):
        text += line
        if match := re.search(pattern, text, flags=re.DOTALL):
            return match
    raise AssertionError(f"{pattern!r} is not in what was written:\n{text[-3000:]}")


def assert_gone(process: subprocess.Popen) -> None:
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny sparse model with a chat template."""
    return saved(tmp_path_factory.mktemp("model") / "tiny", tiny_model(max_position_embeddings=4096), tokenizer)


@pytest.fixture(scope="module")
def client(folder: str) -> Iterator:
    """A client of a server with this model; at the end the server is terminated, and nothing of it is left."""
    with started("serve", folder, "--host", "127.0.0.1", "--port", "0") as process:
        address = read_until(process, r"running on (http://\S+)").group(1)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=ANSWERED)
        process.terminate()
        assert process.wait(ANSWERED) == -signal.SIGTERM
        assert_gone(process)


@pytest.fixture(scope="module")
def local(folder: str):
    """The same model in this process, and its greedy answer to a conversation."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def answer(messages: list[dict], answering=model) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"].shape[1] > LENGTH  # several times the budget
        ids = answering.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def ask(client, folder: str, messages: list[dict], **options: object) -> str:
    """Return a server's greedy answer."""
    reply = client.chat.completions.create(model=folder, messages=messages, max_tokens=NEW, temperature=0, **options)
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
    return reply.choices[0].message.content


def test_the_model_is_listed(client, folder: str) -> None:
    assert [model.id for model in client.models.list()] == [folder]


def test_answers_equal_generate(client, folder: str, local, paragraphs) -> None:
    messages = conversation(paragraphs[0][:900])
    expected = local(messages)
    assert ask(client, folder, messages) == expected
    assert ask(client, folder, messages, stream=True) == expected
    dense = tiny_model(max_position_embeddings=4096, layer_types=["full_attention"] * 2)
    assert local(messages, dense) != expected


def test_several_turns(client, folder: str, local, paragraphs) -> None:
    said = [paragraphs[1][:400]]
    for question in (paragraphs[2][:200], paragraphs[3][:300], None):
        expected = local(conversation(*said))
        assert ask(client, folder, conversation(*said), stream=len(said) == 3) == expected
        said += [expected, question]


def test_concurrent_requests_equal_single_ones(client, folder: str, local, paragraphs) -> None:
    asked = [conversation(paragraph[: 500 + 100 * i]) for i, paragraph in enumerate(paragraphs[4:8])]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda i: ask(client, folder, asked[i], stream=i % 2 == 0), range(4)))
    assert answers == [local(messages) for messages in asked]
    assert len(set(answers)) > 1


def test_a_request_that_cannot_be_honoured_says_why(client, folder: str, local, paragraphs) -> None:
    messages = conversation(paragraphs[0][:900])
    with pytest.raises(openai.BadRequestError, match=rf"pinned to '{re.escape(folder)}'; requested 'nonsense'"):
        ask(client, "nonsense", messages)
    options = {"extra_body": {"generation_config": json.dumps({"cache_implementation": "nonsense"})}}
    with pytest.raises(openai.BadRequestError, match=r"Invalid `cache_implementation` \(nonsense\)"):
        ask(client, folder, messages, **options)
    with pytest.raises(openai.BadRequestError, match="no system here"):
        ask(client, folder, [{"role": "system", "content": SENTENCES}, *messages])
    assert ask(client, folder, messages) == local(messages)  # it goes on


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_chat_brings_its_server_and_takes_it_along(number: int, code: int, folder: str, local) -> None:
    """A conversation in the terminal, ended by Ctrl-C, and by a signal in the middle of an answer."""
    question = SENTENCES * 20
    greedy = ["do_sample=False", "--user", "me"]
    length = f"max_new_tokens={NEW if number == signal.SIGINT else 3000}"
    with started("chat", folder, length, *greedy, "--", "--device", "cpu", stdin=subprocess.PIPE) as process:
        read_until(process, "<me>:")
        process.stdin.write(question + "\n")
        process.stdin.flush()
        if number == signal.SIGINT:
            written = read_until(process, rf"(?<=tiny>:).*{NEW} tokens in").group()
            letters, expected = (re.sub("[^a-zA-Z]", "", text) for text in (written, local(conversation(question))))
            assert letters.startswith(expected)
        else:
            read_until(process, "tiny>:")
            time.sleep(0.5)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=ANSWERED)
        assert process.returncode == code
        assert "Traceback" not in rest
        assert_gone(process)


@pytest.mark.parametrize("recipe", [Int8CpuConfig(), BitsAndBytesConfig(load_in_4bit=True)], ids=["int8-cpu", "4-bit"])
def test_quantized_models_are_loaded(recipe, folder: str, tokenizer, tmp_path) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=recipe)
    path = saved(tmp_path / "quantized", quantized, tokenizer)
    model, _ = serving.ModelManager(device="cpu", force_model=path).load_model_and_processor(f"{path}@main")
    assert type(model) is WhisperLMForCausalLM
    assert torch.equal(model(tokens()).logits, quantized(tokens()).logits)


def test_other_models_are_loaded_dense_or_sparse(tokenizer, tmp_path) -> None:
    path = saved(tmp_path / "qwen", AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, head_dim=8)), tokenizer)
    options = {"device": "cpu", "force_model": path}
    logits = []
    for attention in (None, "masked_sparse"):
        manager = serving.ModelManager(attn_implementation=attention, **options)
        model, _ = manager.load_model_and_processor(f"{path}@main")
        model.config.sparse_attention = SPARSE
        logits.append(model(tokens()).logits)
        batching = {"continuous_batching": True, "attn_implementation": attention}
        if attention is None:
            serving.ModelManager(**batching, **options)
        else:
            with pytest.raises(ValueError, match="got Qwen3ForCausalLM with masked sparse attention"):
                serving.ModelManager(**batching, **options)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="Unsupported attention implementation: 'nonsense'"):
        serving.ModelManager(attn_implementation="nonsense", **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "/no/such/folder"], "/no/such/folder"),
        (["serve", "FOLDER", "--continuous-batching"], "leave out --continuous-batching"),
        (["chat", "model", "--", "--nonsense"], "--nonsense"),
        (["chat", "--user", "me"], "chat takes the model first, got ['--user', 'me']"),
    ],
)
def test_user_errors(arguments: list[str], message: str, folder: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as left:
        main([folder if argument == "FOLDER" else argument for argument in arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("command", "extra"), [("serve", "serving"), ("chat", "serving"), ("lm-eval", "evaluation")])
def test_missing_packages_are_named(command: str, extra: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main([command, "model"])
    assert f"pip install 'whisper-hf[{extra}]'" in capsys.readouterr().err


def test_help(capsys) -> None:
    for arguments, ours, theirs in (
        (["serve", "--help"], "--attn-implementation masked_sparse", "--cb-num-blocks"),
        (["serve", "-h"], "whisper-hf serve smollm2-sparse", "--cb-num-blocks"),
        (["chat", "--help"], "a server of its own", "--system-prompt"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
        written = capsys.readouterr().out
        assert ours in written
        assert theirs in written
