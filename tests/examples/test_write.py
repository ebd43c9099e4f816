"""`examples/write.py`: what the page shows is what the model attended to, and the page is a sound and safe one."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, Qwen3Config, set_seed

from examples import write
from examples.support import attention_map
from whisper_hf import SparseAttentionConfig, from_dense
from whisper_hf.model.attention_reference import attention_reference
from whisper_hf.model.sparse_selection import query_slots, selected_keys, visible_keys
from whisper_hf.repetition.metrics import distinct, looping_share, sequence_repetition

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


@pytest.mark.parametrize("name", ["Greedy", "Nucleus"])
def test_recording_changes_nothing_and_follows_the_text(name: str) -> None:
    """The text is that without recording; the blocks are those of reading the text again, one token at a time."""
    model, ids = tiny_model(), tokens(1)
    args = write.Arguments(max_new_tokens=NEW, seed=3)
    written = write.write(model, byte_tokenizer(), ids[0].tolist(), args)[name]
    assert attention_map.MASKED_SPARSE not in attention_map.ALL_ATTENTION_FUNCTIONS._local_mapping
    set_seed(3)
    plain = model.generate(ids, **args.settings()[name][1], max_new_tokens=NEW, min_new_tokens=NEW)
    assert plain[0].tolist() == ids[0].tolist() + written.tokens

    cache = model(plain[:, : LENGTH - 1], use_cache=True).cache
    with attention_map.recorded_blocks(SETTINGS) as record:
        for place in range(LENGTH - 1, plain.shape[1] - 1):
            model(plain[:, place : place + 1], cache=cache)
    shares = record.shares()
    assert written.heads == 2 * record.kv_heads == 4
    assert torch.equal(written.counts, attention_map.attending_heads(shares, 2).sum(1))
    torch.testing.assert_close(written.shares.sum(1), torch.ones(NEW))
    sink, local = shares[..., 0].mean((1, 2)), [(LENGTH - 1 + step) // SETTINGS.block_size for step in range(NEW)]
    torch.testing.assert_close(written.shares[:, 0], sink, rtol=1e-3, atol=1e-5)
    expected = shares[torch.arange(NEW), :, :, local].mean((1, 2))
    torch.testing.assert_close(written.shares[:, 1], expected, rtol=1e-3, atol=1e-5)


def test_recording_refuses_padding_and_batches() -> None:
    model, shown = tiny_model(), torch.ones_like(tokens(1))
    shown[0, :5] = 0
    with attention_map.recorded_blocks(SETTINGS):
        with pytest.raises(ValueError, match="one text without padding, got 1 and mask"):
            model(tokens(1), attention_mask=shown)
        with pytest.raises(ValueError, match="one text without padding, got 2"):
            model(tokens(2))


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
    """The page of a novel, and the page of a prompt that tries to break out of it."""
    output = tmp_path_factory.mktemp(request.param) / "new" / "page.html"
    text = ["--prompt", 2 * HOSTILE] if request.param == "hostile" else ["--context_tokens", 200]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, "--model", checkpoint, "--output", output, "--max_new_tokens", NEW, *text)
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
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_page_shows_every_token_and_all_of_the_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed, is_hostile = Page(text), "broken in" in text
    book = Path(write.Arguments().text).read_text(encoding="utf-8").encode()  # a token is a byte
    context = 2 * HOSTILE if is_hostile else book[:200].decode()
    assert "".join(parsed.texts["context"]) == context.translate(write.VISIBLE)
    assert ("what stands in the book" in text) != is_hostile
    assert is_hostile or f'<p class="tokens">{html.escape(book[200 : 200 + NEW].decode(), quote=False)}</p>' in text
    for number in range(2):
        assert len(parsed.texts[f"text-{number}"]) == NEW
    titles = re.findall(r'<th scope="row">(\w+)</th>', text)
    assert titles == [*(["Author"] if not is_hostile else []), "Greedy", "Nucleus"]


def test_a_short_prompt_is_read_whole_and_the_page_says_what_was_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kept, original, output = [], write.write, tmp_path / "page.html"
    monkeypatch.setattr(write, "write", lambda *args: kept.append(original(*args)) or kept[0])
    run(monkeypatch, "--model", checkpoint, "--output", output, "--prompt", "Once upon a time", "--max_new_tokens", 20)
    assert "attention is dense" in capsys.readouterr().out
    text = output.read_text(encoding="utf-8")
    data, parsed = json.loads(Page(text).scripts[0]), Page(text)
    for number, (title, written) in enumerate(kept[0].items()):
        assert all(counts[0] == data["heads"] for counts in data["texts"][number]["counts"])
        shown = "".join(parsed.texts[f"text-{number}"]).replace("◌", "")
        assert shown == byte_tokenizer().decode(written.tokens).translate(write.VISIBLE)
        values = [sequence_repetition([written.tokens], 4), *(distinct([written.tokens], n) for n in (1, 2))]
        cells = "".join(f"<td>{value:.3f}</td>" for value in [*values, looping_share([written.tokens])])
        assert f'<th scope="row">{title}</th>{cells}' in text


def test_blocks_of_the_page_add_up(page: Path) -> None:
    data = json.loads(Page(page.read_text(encoding="utf-8")).scripts[0])
    assert data["heads"] == 4  # two layers of two key-value heads
    for text in data["texts"]:
        assert len(text["counts"]) == len(text["shares"]) == NEW
        for token, (counts, shares) in enumerate(zip(text["counts"], text["shares"], strict=True)):
            current = (data["context"] + token - 1) // SETTINGS.block_size
            assert counts[0] == counts[current] == 4  # sink and local: all heads
            assert sum(counts[1:current]) == 4 * SETTINGS.topk_blocks
            assert not any(counts[current + 1 :])
            assert sum(shares) == pytest.approx(1000, abs=2)


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
    root = next(values for tag, values in parsed.seen if tag == "html")
    assert (root["class"], root["data-ready"]) == ("js", "yes")
    assert "looked at while it wrote" in done.stdout[: done.stdout.index("</title>")]
    assert [values for tag, values in parsed.seen if tag == "span" and values.get("class") == "on"]
    data = json.loads(parsed.scripts[0])
    current = (data["context"] + 4) // SETTINGS.block_size
    counts = data["texts"][0]["counts"][5]
    for block in range(-(-data["context"] // SETTINGS.block_size)):
        role = "sink" if block == 0 else "local" if block == current else "chosen" if counts[block] else ""
        assert attributes[f"b{block}"]["class"] == f"block {role}".strip()


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
    assert data["heads"] == 2 * (2 if family == "qwen3" else 4)
    assert sum(data["texts"][0]["counts"][-1]) == 3 * data["heads"]  # a sink, a local and a chosen block


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top_p", 2], "--top_p must be above 0 and at most 1, got 2.0"),
        (["--max_new_tokens", 3], "--max_new_tokens must be at least 4, got 3"),
        (["--output", "page.pdf"], "must be an .html file"),
        (["--context_tokens", 500], "must fit into 512 positions, got 500 + 20"),
        (["--context_tokens", 9_000_000], "--text must have 9000020 tokens"),
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
    monkeypatch.setattr(write, "render", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, "--model", checkpoint, "--output", tmp_path / "page.html", "--prompt", HOSTILE)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "an earlier page"
