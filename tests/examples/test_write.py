"""`examples/write.py`: what the page shows is what the model attended to, and the page is a sound and safe one."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, Qwen3Config, set_seed

from examples import write
from examples.support import attention_map, contrastive
from whisper_hf import SparseAttentionConfig, from_dense
from whisper_hf.model.attention_reference import attention_reference
from whisper_hf.model.sparse_selection import query_slots, selected_keys, visible_keys

from ..conftest import LENGTH, SIZES, SPARSE, tiny_model, tokens

SETTINGS = SparseAttentionConfig(**SPARSE)
NEW = 20
BYTES = 257  # and the end of the text: the vocabulary of byte_tokenizer
HOSTILE = (
    "</script><script>document.title = 'broken in'</script><!-- <img src=x onerror='document.title = 1'> "
    '"quotes" & {{ braces }} é \N{PILE OF POO}\N{NULL}\r\n'
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def foreign(config: Any) -> Any:
    """Return a model of another family that runs with masked sparse attention."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="masked_sparse").eval()
    model.config.sparse_attention = dict(SPARSE)  # as it can be saved
    return model


MODELS = {
    "whisper_lm": tiny_model,
    "one full layer": lambda: tiny_model(layer_types=["full_attention", "masked_sparse_attention"]),
    "qwen3": lambda: foreign(Qwen3Config(**{**SIZES, "vocab_size": BYTES}, head_dim=8)),
    "gpt2": lambda: foreign(
        GPT2Config(vocab_size=BYTES, n_positions=512, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0)
    ),
}
WAYS = {
    "greedy": {"do_sample": False},
    "nucleus": {"do_sample": True, "top_p": 0.9, "top_k": 0, "num_return_sequences": 2},
    "beam": {"do_sample": False, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True},
    "contrastive": {"do_sample": False, "custom_generate": contrastive.contrastive_search},
}


@pytest.mark.parametrize("family", MODELS)
def test_recorded_blocks_are_those_of_the_reference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded is chosen by the definition too, and attending to nothing else gives the model's output."""
    model, calls = MODELS[family](), []
    forward = attention_map.masked_sparse_attention_forward

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        output = forward(module, query, key, value, mask, **kwargs)
        calls.append((query, key, value, output[0], kwargs.get("scaling") or query.shape[-1] ** -0.5))
        return output

    monkeypatch.setattr(attention_map, "masked_sparse_attention_forward", watched)
    with attention_map.recorded_blocks(SETTINGS) as record:
        model.generate(tokens(1), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    shares, kept = record.shares(), calls[1::2]  # the first call of each pair asked for the blocks
    assert shares.shape[:3] == (NEW, 2, 4)
    torch.testing.assert_close(shares.sum(-1), torch.ones(NEW, 2, 4))
    assert [record.is_sparse[layer] for layer in (0, 1)] == [family != "one full layer", True]
    for number, (query, key, value, output, scaling) in enumerate(kept):
        step, layer = divmod(number, 2)
        kv_heads, length = key.shape[1:3]
        blocks = shares[step, layer].unflatten(0, (kv_heads, -1)).gt(0).any(1)  # [K, N]
        mine = blocks[:, torch.arange(length) // SETTINGS.block_size][None, :, None]
        if record.is_sparse[layer]:
            slots = query_slots(None, query.shape[2], length, key.device)[:, -1:]
            expected = selected_keys(query[:, :, -1:], key, visible_keys(None, slots, length), SETTINGS)
            assert torch.equal(mine, expected)
            assert not mine.all()
        alone, _ = attention_reference(query[:, :, -1:], key, value, mine, scaling)
        torch.testing.assert_close(alone[:, :, 0], output[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_recording_changes_nothing_and_follows_the_text(way: str) -> None:
    """The text is that without recording; the blocks are those of reading the text again, one token at a time."""
    model = tiny_model()
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    set_seed(3)
    plain = model.generate(tokens(1), **WAYS[way], **length)
    set_seed(3)
    with attention_map.recorded_blocks(SETTINGS) as record:
        output = model.generate(tokens(1), **WAYS[way], **length)
    assert attention_map.MASKED_SPARSE not in attention_map.ALL_ATTENTION_FUNCTIONS._local_mapping
    ids = getattr(output, "sequences", output)
    assert torch.equal(ids, getattr(plain, "sequences", plain))
    rows = output.beam_indices[0].tolist() if way in ("beam", "contrastive") else [0] * NEW
    assert (len(set(rows)) > 1) == (way in ("beam", "contrastive"))

    torch.testing.assert_close(record.shares(rows), reread(model, ids[:1]), rtol=1e-3, atol=1e-5)
    assert torch.equal(record.shares(rows) > 0, reread(model, ids[:1]) > 0)


def reread(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return what the tokens after the first `LENGTH` were predicted from, by reading them one by one."""
    cache = model(ids[:, : LENGTH - 1], use_cache=True).cache
    with attention_map.recorded_blocks(SETTINGS) as record:
        for place in range(LENGTH - 1, ids.shape[1] - 1):
            model(ids[:, place : place + 1], cache=cache)
    return record.shares()


@pytest.mark.parametrize("key", ["greedy", "nucleus", "contrastive", "beam"])
def test_attention_shown_is_that_behind_the_text_shown(key: str) -> None:
    """Though all settings share one reading of the context, and write several texts at a time."""
    model, context = tiny_model(), tokens(1)[0].tolist()
    args = write.Arguments(max_new_tokens=NEW, top_p=1.0)
    cache, states = write.read_context(model, context)
    written = write.write(model, context, cache, write.settings_from(args, states)[key], args)
    ids = torch.tensor([context + written.texts[0]])
    torch.testing.assert_close(written.shares, reread(model, ids), rtol=1e-3, atol=1e-5)
    assert cache.get_seq_length() == LENGTH - 1
    assert len(written.texts) == (1 if key in ("greedy", "contrastive") else 4)
    if key == "greedy":
        assert torch.equal(
            ids, model.generate(ids[:, :LENGTH], do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
        )


@torch.no_grad()
def test_contrastive_search_is_its_definition() -> None:
    model, ids, states = tiny_model(), tokens(1, 60), None
    found = model.generate(
        ids,
        custom_generate=contrastive.contrastive_search,
        candidates=3,
        penalty=0.5,
        max_new_tokens=12,
        eos_token_id=-1,
    ).sequences
    for _ in range(12):
        output = model(ids, output_hidden_states=True)
        states, (likely, top) = output.hidden_states[-1][0], output.logits[0, -1].softmax(-1).topk(3)
        scores = []
        for probability, token in zip(likely, top, strict=True):
            longer = model(torch.cat([ids, token.view(1, 1)], 1), output_hidden_states=True).hidden_states[-1][0, -1]
            scores.append(0.5 * probability - 0.5 * torch.cosine_similarity(longer[None], states).max())
        ids = torch.cat([ids, top[torch.stack(scores).argmax()].view(1, 1)], 1)
    assert torch.equal(found, ids)
    with pytest.raises(ValueError, match="expected one text"):
        model.generate(tokens(2, 60), custom_generate=contrastive.contrastive_search, max_new_tokens=2)


def test_pieces_are_the_text() -> None:
    byte_level = byte_tokenizer()
    text = "né \N{PILE OF POO}\x00!"
    ids = byte_level(text).input_ids
    found = write.pieces(byte_level, ids, [[token] for token in ids])
    assert "".join(found) == text.replace("\x00", "\N{SYMBOL FOR NULL}")
    assert len(found) == len(ids) == 10
    assert found[:3] == ["n", "", "é"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: any text survives it, and a random model writes anything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate([*alphabet, "<eos>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny WhisperLM on bytes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=BYTES, eos_token_id=256, pad_token_id=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the example as a user would, in this process."""
    monkeypatch.setattr(sys, "argv", ["write.py", *map(str, arguments)])
    write.main()


@pytest.fixture(scope="module", params=["novel", "hostile"])
def page(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a novel, and that of a prompt that tries to break out of it."""
    output = tmp_path_factory.mktemp(request.param) / "new" / "page.html"
    text = ["--prompt", 2 * HOSTILE] if request.param == "hostile" else ["--context_tokens", 200]
    with pytest.MonkeyPatch.context() as monkeypatch:
        sizes = ["--max_new_tokens", NEW, "--samples", 2, "--beams", 2]
        run(monkeypatch, "--model", checkpoint, "--output", output, *sizes, *text)
    return output


class Page(HTMLParser):
    """Collects what the checks need, and complains about tags that are left open or closed twice."""

    VOID = ("meta", "input", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}  # by class or id of the element, the spans in it
        self.scripts: list[str] = []
        self.place = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.seen.append((tag, values))
        if tag in ("p", "div"):
            self.place = values.get("id") or (values.get("class") or "").split(" ")[0]
        if tag == "span":
            self.texts.setdefault(self.place, []).append("")
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open[-1:] == ["span"]:
            self.texts[self.place][-1] += text
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += text


def unpacked(packed: str, *shape: int) -> np.ndarray:
    """Return the array that a page holds."""
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8).reshape(shape)


def test_page_is_sound_and_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(text) < 200_000
    assert [tag for tag, _ in parsed.seen].count("script") == len(parsed.scripts) == 2
    names = {name for _, values in parsed.seen for name in values}
    assert not names & {"src", "href", "onerror", "onload", "onclick", "srcset", "action"}
    assert not {"img", "link", "iframe", "object", "base"} & {tag for tag, _ in parsed.seen}
    assert not re.search(r"https?:|//\w+\.|url\(|@import", text.replace(parsed.scripts[0], ""))
    identifiers = [values["id"] for _, values in parsed.seen if "id" in values]
    assert len(identifiers) == len(set(identifiers))
    assert not list(page.parent.glob(".*"))
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html", "page.json"]


def test_page_shows_every_token_and_all_of_the_text(page: Path) -> None:
    parsed, figures = Page(page.read_text(encoding="utf-8")), json.loads(page.with_suffix(".json").read_text())
    is_hostile = figures["run"]["prompt"] is not None
    book = Path(figures["run"]["text"]).read_text(encoding="utf-8")
    context = 2 * HOSTILE if is_hostile else book.encode()[:200].decode()
    assert "".join(parsed.texts["context"]) == context.translate(write.VISIBLE)
    assert ("author" in figures["results"]) != is_hostile
    settings = [name for name in figures["results"] if name != "author"]
    assert settings == ["greedy", "nucleus", "contrastive", "beam"]
    for number, name in enumerate(settings):
        spans, result = parsed.texts[f"text-{number}"], figures["results"][name]
        assert len(spans) == NEW
        assert "".join(spans).replace("◌", "") == result["text"].translate(write.VISIBLE)
        assert sum(result["attention"].values()) == pytest.approx(1)
        assert all(result[measure] is None or 0 <= result[measure] <= 1 for measure in write.MEASURES)


def test_blocks_of_the_page_add_up(page: Path) -> None:
    data = json.loads(Page(page.read_text(encoding="utf-8")).scripts[0])
    context, size = data["context"], SETTINGS.block_size
    assert data["isSparse"] == [True, True]
    for one in data["maps"]:
        heads = unpacked(one["heads"], 2, data["blocks"], NEW)
        shares = unpacked(one["shares"], 2, 2, NEW)
        assert shares.max() <= 255
        for token in range(NEW):
            current = (context + token - 1) // size
            of_token = heads[:, :, token]
            assert (of_token[:, 0] == 2).all()  # the sink, by both key-value heads
            assert (of_token[:, current] == 2).all()
            assert (of_token[:, 1:current].sum(1) == 2 * SETTINGS.topk_blocks).all()
            assert not of_token[:, current + 1 :].any()


def test_page_works_in_a_browser(page: Path, tmp_path: Path) -> None:
    """With a token in the address, the page shows which blocks that token attended to, and no foreign script runs."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"{page.as_uri()}#token-0-5"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-1000:]
    parsed = Page(done.stdout)
    attributes = {values.get("id"): values for _, values in parsed.seen}
    html = next(values for tag, values in parsed.seen if tag == "html")
    assert (html["class"], html["data-ready"]) == ("js", "yes")
    assert "looked at while it wrote" in done.stdout[: done.stdout.index("</title>")]
    chosen = [values for tag, values in parsed.seen if values.get("aria-selected") == "true"]
    assert [values["class"] for values in chosen] == ["on"]

    data = json.loads(parsed.scripts[0])
    current = (data["context"] + 4) // SETTINGS.block_size
    heads = unpacked(data["maps"][0]["heads"], 2, data["blocks"], NEW)[:, :, 5].sum(0)
    for block in range(-(-data["context"] // SETTINGS.block_size)):
        role = "sink" if block == 0 else "local" if block == current else "past" if heads[block] else ""
        assert attributes[f"b{block}"]["class"] == f"b {role}"


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_models_of_other_families_run_sparse(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is converted, the other runs as it is."""
    MODELS[family]().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(write, "from_dense", lambda *args, **kwargs: converted.append(1) or from_dense(*args, **kwargs))
    converted: list[int] = []
    given = {"model": tmp_path / "model", "output": tmp_path / "page.html", "prompt": 8 * "plain ASCII only, "}
    options = [item for name, value in given.items() for item in (f"--{name}", value)]
    run(monkeypatch, *options, "--max_new_tokens", 20, "--sparse_attention", json.dumps(SPARSE))
    assert len(converted) == (family == "qwen3")
    data = json.loads(Page((tmp_path / "page.html").read_text(encoding="utf-8")).scripts[0])
    assert (data["isSparse"], data["kvHeads"]) == ([True, True], 2 if family == "qwen3" else 4)
    heads = unpacked(data["maps"][0]["heads"], 2, data["blocks"], 20)
    assert (heads.sum(1)[:, -1] == 3 * data["kvHeads"]).all()  # a sink, a local and a chosen block


def test_short_prompt_is_read_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "page.html"
    run(monkeypatch, "--model", checkpoint, "--output", output, "--prompt", "Once upon a time", "--max_new_tokens", 6)
    assert "attention is dense" in capsys.readouterr().out
    data = json.loads(Page(output.read_text(encoding="utf-8")).scripts[0])
    assert (unpacked(data["maps"][0]["heads"], 2, data["blocks"], 6)[:, 0] == 2).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--penalty", 2], "--penalty must be above 0 and at most 1, got 2.0"),
        (["--samples", 1], "--samples must be at least 2, got 1"),
        (["--output", "page.pdf"], "must be an .html file"),
        (["--context_tokens", 500], "must fit into 512 positions, got 500 + 20"),
        (["--context_tokens", 9_000_000], "--text must have 9000080 tokens"),
        (["--text", "/no/such/book.txt"], "No such file"),
        (["--prompt", "a"], "at least 2 tokens, got 1"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--sparse_attention", '{"topk": 4}'], "has no field 'topk'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list,
    words: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    defaults = {"--model": checkpoint, "--output": tmp_path / "new" / "page.html", "--max_new_tokens": NEW}
    given = {**defaults, **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *(item for pair in given.items() for item in pair))
    assert words in f"{error.value} {capsys.readouterr().err}"
    assert not any(tmp_path.iterdir())


def test_failure_on_the_way_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text("an earlier page")
    monkeypatch.setattr(write, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(
            monkeypatch,
            "--model",
            checkpoint,
            "--output",
            tmp_path / "page.html",
            "--prompt",
            HOSTILE,
            "--max_new_tokens",
            4,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "an earlier page"
