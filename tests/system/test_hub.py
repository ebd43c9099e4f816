"""Models go to a Hub and come back, by the real client: whole, or not at all with a clear error."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from whisper_hf import model_card
from whisper_hf.cards.results import save_results

from ..conftest import SIZES, tiny_model, tokens
from ..helpers.hub_client import ClientError, HubClient
from ..helpers.hub_server import HubServer, LargeFile

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
IDS = tokens().tolist()


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A Hub with two users."""
    with HubServer(TOKENS) as hub:
        yield hub


@pytest.fixture(scope="module")
def clients(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, HubClient]]:
    """Alice with this package, and Alice's other machine without; both start at once."""
    homes, lfs = tmp_path_factory.mktemp("clients"), {"HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1"}
    both = {plugin: HubClient(hub.url, homes / plugin, f"{plugin} the plugin", **lfs) for plugin in ("with", "without")}
    yield both
    for client in both.values():
        client.close()


@pytest.fixture(scope="module")
def alice(clients: dict[str, HubClient]) -> HubClient:
    """A process with the plugin."""
    return clients["with"]


@pytest.fixture(scope="module")
def stranger(clients: dict[str, HubClient]) -> HubClient:
    """A process in which the plugin cannot be imported."""
    return clients["without"]


def save(folder: Path, tokenizer: Any, **overrides: Any) -> Path:
    """Write a checkpoint with its own generation settings."""
    model = tiny_model(**overrides)
    model.generation_config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.1, pad_token_id=0, eos_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A checkpoint of a tiny sparse model."""
    return save(tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The same with other weights."""
    return save(tmp_path_factory.mktemp("other"), tokenizer, initializer_range=0.1)


@pytest.fixture(scope="module")
def pushed(alice: HubClient, folder: Path) -> str:
    """A repo with model, generation config and tokenizer."""
    alice.run(push, source=str(folder), repo_id="alice/tiny")
    return "alice/tiny"


def push(source: str, repo_id: str, tokenizer: bool = True, **options: Any) -> None:
    """Push a checkpoint from a folder (in a client)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source).push_to_hub(repo_id, **options)
    if tokenizer:
        options.pop("max_shard_size", None)
        AutoTokenizer.from_pretrained(source).push_to_hub(repo_id, **options)


def pull(repo_id: str, ids: list[list[int]], densely: bool = False, **options: Any) -> dict[str, Any]:
    """Load a model and run it as it is, and if asked also with dense layers (in a client)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(repo_id, **options)
    found = {"module": type(model).__module__.split(".")[0], "generation": model.generation_config.to_diff_dict()}
    models = {"logits": model}
    if densely:
        dense_layers = {"layer_types": ["full_attention"] * 2}
        models["dense"] = AutoModelForCausalLM.from_pretrained(repo_id, **dense_layers, **options)
    with torch.no_grad():
        return found | {name: model(torch.tensor(ids)).logits.tolist() for name, model in models.items()}


@torch.no_grad()
def expected(folder: Path) -> list[Any]:
    """Return the logits of the checkpoint in a folder."""
    return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(IDS)).logits.tolist()


def differ(some: list[Any], others: list[Any]) -> bool:
    return (torch.tensor(some) - torch.tensor(others)).abs().max().item() > 1e-3


def test_a_pushed_model_is_itself_again(hub, alice, stranger, pushed, folder) -> None:
    assert {WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= hub.names(pushed)
    assert isinstance(hub.repos[pushed].files("main")[WEIGHTS], LargeFile)
    mine = alice.run(pull, repo_id=pushed, ids=IDS, densely=True)
    theirs = stranger.run(pull, repo_id=pushed, ids=IDS, densely=True, trust_remote_code=True)
    assert (mine["module"], theirs["module"]) == ("whisper_hf", "transformers_modules")
    for got in (mine, theirs):
        assert got["logits"] == expected(folder)
        assert differ(got["logits"], got["dense"])
        assert got["generation"].items() >= {"max_new_tokens": 7, "repetition_penalty": 1.1}.items()


def test_tokenizer_and_template_come_back(stranger, pushed, tokenizer) -> None:
    def read(repo_id: str, chat: list[dict[str, str]]) -> list[int]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(repo_id, trust_remote_code=True)  # it reads the config
        return tokenizer.apply_chat_template(chat, return_dict=False, add_generation_prompt=True)

    chat = [{"role": "user", "content": "It was a truth"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False, add_generation_prompt=True)
    assert stranger.run(read, repo_id=pushed, chat=chat) == ids


def test_the_code_of_a_repo_runs_only_when_trusted(stranger, pushed) -> None:
    with pytest.raises(ClientError, match="trust_remote_code=True"):
        stranger.run(pull, repo_id=pushed, ids=IDS, trust_remote_code=False)


def test_a_private_repo_opens_to_its_owner_alone(hub, alice, stranger, folder) -> None:
    alice.run(push, source=str(folder), repo_id="alice/secret", private=True)
    assert hub.repos["alice/secret"].private
    got = stranger.run(pull, repo_id="alice/secret", ids=IDS, trust_remote_code=True, token="hf_alice")
    assert got["logits"] == expected(folder)
    for token in ("hf_bob", False):
        with pytest.raises(ClientError, match="is not a local folder and is not a valid model identifier"):
            alice.run(pull, repo_id="alice/secret", ids=IDS, token=token, force_download=True)


def test_branches_and_tags_keep_their_weights(hub, alice, stranger, folder, other_folder) -> None:
    def tag(repo_id: str) -> None:
        from huggingface_hub import HfApi

        HfApi().create_tag(repo_id, tag="v1.0")

    alice.run(push, source=str(folder), repo_id="alice/versions")
    alice.run(tag, repo_id="alice/versions")
    alice.run(push, source=str(other_folder), repo_id="alice/versions", revision="next/try")
    first, branch = expected(folder), expected(other_folder)
    assert differ(first, branch)
    assert alice.run(pull, repo_id="alice/versions", ids=IDS)["logits"] == first
    assert alice.run(pull, repo_id="alice/versions", ids=IDS, revision="next/try")["logits"] == branch
    alice.run(push, source=str(other_folder), repo_id="alice/versions")
    by_revision = {"main": branch, "v1.0": first, hub.repos["alice/versions"].tags["v1.0"]: first}
    for revision, logits in by_revision.items():
        got = stranger.run(pull, repo_id="alice/versions", ids=IDS, revision=revision, trust_remote_code=True)
        assert got["logits"] == logits


def test_checksums_on_the_hub_are_those_of_the_weights(hub, alice, stranger, folder, other_folder, tmp_path) -> None:
    """Also where saving ends with the upload: then with those of this time, not of the time before."""

    def save_and_push(source: str, target: str) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source)
        model.save_pretrained(target, push_to_hub=True, repo_id="alice/both")

    for source in (folder, other_folder):
        alice.run(save_and_push, source=str(source), target=str(tmp_path / "both"))
        assert "SHA256SUMS" in hub.names("alice/both")
        got = stranger.run(pull, repo_id="alice/both", ids=IDS, trust_remote_code=True, verify_checksums=True)
        assert got["logits"] == expected(source)
        assert alice.run(pull, repo_id="alice/both", ids=IDS, verify_checksums=True)["logits"] == expected(source)


def test_weights_that_have_changed_on_the_hub_are_found_on_request(alice, stranger, folder, tmp_path) -> None:
    def verify(repo_id: str) -> int:
        from whisper_hf.__main__ import main

        return main(["verify", repo_id])

    shutil.copytree(folder, tmp_path / "changed")
    contents = bytearray((tmp_path / "changed" / WEIGHTS).read_bytes())
    contents[-9] ^= 1
    (tmp_path / "changed" / WEIGHTS).write_bytes(contents)
    alice.run(upload, folder=str(tmp_path / "changed"), repo_id="alice/changed")
    for client, options in ((alice, {}), (stranger, {"trust_remote_code": True})):
        client.run(pull, repo_id="alice/changed", ids=IDS, **options)
        with pytest.raises(ClientError, match=rf"{WEIGHTS} is not the file that was saved"):
            client.run(pull, repo_id="alice/changed", ids=IDS, verify_checksums=True, **options)
    assert alice.run(verify, repo_id="alice/changed") == 1
    alice.run(upload, folder=str(folder), repo_id="alice/changed")
    assert alice.run(verify, repo_id="alice/changed") == 0


def test_sharded_weights_come_back(hub, alice, stranger, folder) -> None:
    alice.run(push, source=str(folder), repo_id="alice/shards", max_shard_size="30KB")
    shards = {name for name in hub.names("alice/shards") if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert INDEX in hub.names("alice/shards")
    got = stranger.run(pull, repo_id="alice/shards", ids=IDS, trust_remote_code=True)
    assert got["logits"] == expected(folder)


def test_an_adapter_finds_its_base(hub, alice, stranger, pushed) -> None:
    def push_adapter(base: str, repo_id: str, ids: list[list[int]]) -> list[Any]:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base_model = AutoModelForCausalLM.from_pretrained(base)
        settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(base_model, settings).eval()
        adapted.push_to_hub(repo_id)
        with torch.no_grad():
            return adapted(torch.tensor(ids)).logits.tolist()

    def pull_adapter(repo_id: str, ids: list[list[int]], **options: Any) -> list[Any]:
        import torch
        from peft import AutoPeftModelForCausalLM

        with torch.no_grad():
            return AutoPeftModelForCausalLM.from_pretrained(repo_id, **options)(torch.tensor(ids)).logits.tolist()

    adapted = alice.run(push_adapter, base=pushed, repo_id="alice/adapter", ids=IDS)
    assert {ADAPTER, "adapter_config.json"} <= hub.names("alice/adapter")
    assert WEIGHTS not in hub.names("alice/adapter")
    assert differ(adapted, alice.run(pull, repo_id=pushed, ids=IDS)["logits"])
    assert alice.run(pull_adapter, repo_id="alice/adapter", ids=IDS) == adapted
    assert stranger.run(pull_adapter, repo_id="alice/adapter", ids=IDS, trust_remote_code=True) == adapted


def push_quantized(source: str, repo_id: str, recipe: str, ids: list[list[int]]) -> list[Any]:
    """Quantize a checkpoint while loading it, push it, then run it (in a client)."""
    import torch
    from transformers import AutoModelForCausalLM

    from whisper_hf.quantization import recipe as named

    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=named(recipe))
    model.push_to_hub(repo_id)
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.tolist()


@pytest.mark.parametrize("recipe", ["int8", "nf4", "int8-cpu"])
def test_a_quantized_model_comes_back(alice, stranger, tmp_path, tokenizer, recipe) -> None:
    source = save(tmp_path, tokenizer, hidden_size=64, intermediate_size=128)
    repo_id = f"alice/{recipe}"
    logits = alice.run(push_quantized, source=str(source), repo_id=repo_id, recipe=recipe, ids=IDS)
    assert logits != expected(source)
    got = alice.run(pull, repo_id=repo_id, ids=IDS, densely=True)
    assert got["logits"] == logits
    assert differ(logits, got["dense"])
    if recipe == "int8-cpu":  # its layers are the plugin's
        with pytest.raises(ClientError, match="int8-cpu"):
            stranger.run(pull, repo_id=repo_id, ids=IDS, trust_remote_code=True)
    else:
        assert stranger.run(pull, repo_id=repo_id, ids=IDS, trust_remote_code=True)["logits"] == logits


def test_the_stock_trainer_pushes(hub, alice, stranger, folder, tmp_path) -> None:
    def train(source: str, output: str, repo_id: str, ids: list[list[int]]) -> list[Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

        arguments = TrainingArguments(
            output,
            push_to_hub=True,
            hub_model_id=repo_id,
            hub_strategy="every_save",
            max_steps=2,
            save_steps=1,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
        )
        model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.push_to_hub()
        with torch.no_grad():
            return model.eval()(torch.tensor(ids)).logits.tolist()

    trained = alice.run(train, source=str(folder), output=str(tmp_path), repo_id="alice/trained", ids=IDS)
    assert differ(trained, expected(folder))
    assert {WEIGHTS, "training_args.bin", "tokenizer.json", "README.md"} <= hub.names("alice/trained")
    got = stranger.run(pull, repo_id="alice/trained", ids=IDS, densely=True, trust_remote_code=True)
    assert got["logits"] == trained
    assert differ(trained, got["dense"])


def test_a_wrong_token_is_refused_and_changes_nothing(hub, alice, pushed, other_folder) -> None:
    before = hub.head(pushed)
    with pytest.raises(ClientError, match="Invalid credentials in Authorization header"):
        alice.run(push, source=str(other_folder), repo_id=pushed, token="hf_wrong")
    with pytest.raises(ClientError, match="403 Forbidden"):
        alice.run(push, source=str(other_folder), repo_id=pushed, token="hf_bob")
    assert hub.head(pushed) == before


def test_a_wrong_revision_is_named(alice, pushed) -> None:
    with pytest.raises(ClientError, match="v9 is not a valid git identifier"):
        alice.run(pull, repo_id=pushed, ids=IDS, revision="v9")


def upload(folder: str, repo_id: str, **options: Any) -> None:
    """Push a folder in one commit (in a client)."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id, exist_ok=True)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **options)


def test_a_wrong_revision_is_not_pushed_to(hub, alice, pushed, other_folder) -> None:
    before = hub.head(pushed)
    with pytest.raises(ClientError, match="Revision Not Found"):
        alice.run(upload, folder=str(other_folder), repo_id=pushed, revision="v9")
    assert hub.head(pushed) == before


def push_impatiently(source: str, repo_id: str, **options: Any) -> None:
    """Push without a pause between attempts (in a client that knows `push`)."""
    from unittest.mock import patch

    with patch("huggingface_hub.utils._http.time.sleep"):
        push(source, repo_id, tokenizer=False, **options)


@pytest.mark.parametrize("what", ["third large file", "commit"])
def test_a_cut_upload_leaves_the_repo_and_can_be_repeated(hub, alice, stranger, folder, other_folder, what) -> None:
    repo_id, options = f"alice/cut-{what.split()[0]}", {"max_shard_size": "30KB"}
    alice.run(push, source=str(folder), repo_id=repo_id, **options)
    before, done = hub.head(repo_id), len(hub.uploads)
    hub.cut_commit() if what == "commit" else hub.cut_upload(3)
    error = "Error while uploading 'model-0000" if what != "commit" else "ReadError|WriteError|RemoteProtocolError"
    try:
        with pytest.raises(ClientError, match=error):
            alice.run(push_impatiently, source=str(other_folder), repo_id=repo_id, **options)
    finally:
        hub.mend()
    assert hub.head(repo_id) == before
    got = stranger.run(pull, repo_id=repo_id, ids=IDS, trust_remote_code=True, force_download=True)
    assert got["logits"] == expected(folder)

    alice.run(push_impatiently, source=str(other_folder), repo_id=repo_id, **options)
    assert hub.head(repo_id) != before
    assert len(hub.uploads[done:]) == len(set(hub.uploads[done:]))  # what had arrived was not sent again
    got = stranger.run(pull, repo_id=repo_id, ids=IDS, trust_remote_code=True)
    assert got["logits"] == expected(other_folder)


def test_a_card_travels_with_its_model(hub, alice, stranger, folder, tmp_path) -> None:
    def execute(code: str) -> int:
        space: dict[str, Any] = {}
        exec(code, space)
        return space["model"].num_parameters()

    def push_card(content: str, repo_id: str) -> None:
        from huggingface_hub import ModelCard

        ModelCard(content).push_to_hub(repo_id)

    def in_repo() -> str:
        return hub.repos[repo_id].files("main")["README.md"].decode()

    repo_id, results, whole = "alice/card", tmp_path / "results.json", tmp_path / "whole"
    record = {"model": "tiny", "task": "perplexity", "dataset": "novel", "metric": "perplexity", "value": 21.5}
    save_results(results, [record], command="python measure.py", device="one core")
    shutil.copytree(folder, whole)
    model = AutoModelForCausalLM.from_pretrained(folder)
    known = {"name": "tiny", "license": "apache-2.0", "commands": "python train.py", "repo_id": repo_id}
    card = model_card(model, results, **known)
    card.save(whole / "README.md")
    alice.run(upload, folder=str(whole), repo_id=repo_id)
    assert len(hub.repos[repo_id].commits) == 2  # the empty one, and all at once
    assert in_repo() == str(card)

    alice.run(push, source=str(folder), repo_id=repo_id)  # which writes a card only where there is none
    assert in_repo() == str(card)
    changed = model_card(model, results, base_model="user/base", **known)
    alice.run(push_card, content=str(changed), repo_id=repo_id)
    assert in_repo() == str(changed) != str(card)

    with_plugin, without = re.findall(r"```python\n(.*?)```", in_repo(), flags=re.DOTALL)
    assert alice.run(execute, code=with_plugin) == stranger.run(execute, code=without) == model.num_parameters()


def push_texts(repo_id: str, files: dict[str, str]) -> None:
    """Push files to a data set."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset")
    for name, content in files.items():
        api.upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id=repo_id, repo_type="dataset")


def packed(repo_id: str, tokenizer: str, folder: str, rows: list[int]) -> list[list[int]]:
    """Return the tokens of some rows of a data set that `examples/pretrain.py` streams."""
    from transformers import AutoTokenizer, TrainingArguments

    from examples import pretrain

    script = pretrain.ScriptArguments(train_data=[repo_id])
    args = TrainingArguments(folder, max_steps=40, train_sampling_strategy="sequential", use_cpu=True)
    documents = pretrain.read(script.train_data, script.train_split, script)
    stream = pretrain.PackedStream(documents, AutoTokenizer.from_pretrained(tokenizer), args, row_tokens=64)
    return [stream[row]["input_ids"].tolist() for row in rows]


def test_a_data_set_is_streamed_and_resumed(alice, folder, tmp_path, tokenizer, paragraphs) -> None:
    """Texts of two files, in rows; then rows in the middle of the second epoch, by notes of where they begin."""
    lines = [json.dumps({"text": text}) for text in paragraphs[:12]]
    files = {f"train-{i}.jsonl": "\n".join(lines[i::2]) for i in range(2)}
    alice.run(push_texts, repo_id="alice/texts", files=files)
    same = {"repo_id": "alice/texts", "tokenizer": str(folder)}
    rows = alice.run(packed, **same, folder=str(tmp_path / "stream"), rows=[*range(280)])
    expected = tokenizer(paragraphs[:12])["input_ids"]
    read = [token for row in rows for token in row]
    assert len(read) > 2 * sum(map(len, expected))
    ends = [i for i, token in enumerate(read) if token == tokenizer.eos_token_id]
    documents = [read[start + 1 : end] for start, end in zip([-1, *ends], ends, strict=False)]
    for epoch in range(2):
        assert sorted(documents[12 * epoch : 12 * (epoch + 1)]) == sorted(expected)
    assert alice.run(packed, **same, folder=str(tmp_path / "stream"), rows=[190, 191]) == rows[190:192]


def test_a_recipe_takes_hub_ids(alice, tmp_path, tokenizer, paragraphs) -> None:
    """The teacher and the text from a Hub, all else as on the command line."""

    def make(arguments: list[str], output: str) -> list[str]:
        import os
        import sys

        sys.argv = ["whisper_lm_mini.py", *arguments, "--output_dir", output]
        from examples.recipes import whisper_lm_mini

        whisper_lm_mini.main()
        return os.listdir(output)

    LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 3})).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    alice.run(upload, folder=str(tmp_path / "dense"), repo_id="alice/dense")
    alice.run(
        push_texts,
        repo_id="alice/prose",
        files={"train.jsonl": "\n".join(json.dumps({"prose": text}) for text in paragraphs)},
    )
    sizes = {"num_hidden_layers": 2, "intermediate_size": 32, "row_tokens": 64, "max_steps": 1, "recovery_steps": 0}
    arguments = {"teacher": "alice/dense", "train_data": "alice/prose", "text_column": "prose", **sizes}
    words = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    output = str(tmp_path / "made")
    made = alice.run(make, arguments=words, output=output)
    assert {"cut", "model", "model-int8-adapter", "model-nf4-adapter"} <= {*made}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made" / "model").config.num_hidden_layers == 2


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="there is no hf_xet")
def test_weights_travel_through_xet(folder, tmp_path) -> None:
    def download(repo_id: str) -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(repo_id)

    (tmp_path / "store").mkdir()
    with HubServer(TOKENS, xet_store=tmp_path / "store") as hub:
        sender = HubClient(hub.url, tmp_path / "sender", "either", HF_TOKEN="hf_alice")
        receiver = HubClient(hub.url, tmp_path / "receiver", "either", HF_TOKEN="hf_bob")
        sender.run(upload, folder=str(folder), repo_id="alice/xet")
        received = receiver.run(download, repo_id="alice/xet")
        sender.close()
        receiver.close()
    weights = hub.repos["alice/xet"].files("main")[WEIGHTS]
    assert isinstance(weights, LargeFile)
    assert weights.xet
    assert not hub.stored  # nothing went through LFS
    assert expected(Path(received)) == expected(folder)
