"""A saved model is itself again: without the plugin by its own code, with it by the Auto classes, and still sparse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import whisper_hf

from ..conftest import ROOT, tiny_model, tokens

WITHOUT_PLUGIN = """
import os, sys, torch

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "whisper_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import transformers.generation, transformers.models.qwen3.modeling_qwen3
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

folder, ids = sys.argv[1], torch.load(sys.argv[2])
for out in sys.argv[3:]:  # a process for each
    if os.fork() == 0:
        break
else:
    sys.exit(any([os.wait()[1] for _ in sys.argv[3:]]))
os.chdir(out if out.endswith("elsewhere") else os.environ["REPOSITORY"])  # sys.path begins with the working directory
trusted = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
dense = AutoModelForCausalLM.from_pretrained(folder, layer_types=["full_attention"] * 2, **trusted)
attention_mask = torch.ones_like(ids)
attention_mask[0, :30] = 0
model.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", **trusted)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, **trusted)
torch.save({
    "implementation": model.config._attn_implementation,
    "module": type(model).__module__,
    "logits": model(ids).logits,
    "gradient": torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0],
    "padded": model(ids, attention_mask=attention_mask).logits,
    "again": again(ids).logits,
    "dense": dense(ids).logits,
    "hidden": AutoModel.from_pretrained(folder, **trusted)(ids).last_hidden_state,
    "generated": model.generate(ids, max_new_tokens=8, do_sample=False),
    "classes": classifier(ids).logits.shape,
}, out + "/result.pt")
"""


PLACES = ["elsewhere", "in the repository"]  # working directories


@pytest.fixture(scope="module")
def without_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of a process in each place in which the plugin cannot be imported."""
    folder = tmp_path_factory.mktemp("without")
    tiny_model().save_pretrained(folder / "my-model v1.0+é")  # operators are named after the folder
    torch.save(tokens(), folder / "ids.pt")
    for place in PLACES:
        (folder / place).mkdir()
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    arguments = [str(folder / name) for name in ("my-model v1.0+é", "ids.pt", *PLACES)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, *arguments],
        env={**environment, "REPOSITORY": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_remote_code_without_the_plugin(place: str, without_plugin: Path) -> None:
    model, ids = tiny_model(), tokens()
    result = torch.load(without_plugin / place / "result.pt")
    assert result["implementation"] == "masked_sparse"
    assert result["module"].startswith("transformers_modules")
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :30] = 0
    assert torch.equal(result["logits"], model(ids).logits)
    expected = torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0]
    assert torch.equal(result["gradient"], expected)
    assert torch.equal(result["again"], model(ids).logits)
    assert torch.equal(result["padded"], model(ids, attention_mask=attention_mask).logits)
    assert torch.equal(result["hidden"], model.model(ids).last_hidden_state)
    assert torch.equal(result["generated"], model.generate(ids, max_new_tokens=8, do_sample=False))
    assert (result["logits"] - result["dense"]).abs().max() > 1e-3
    assert result["classes"] == (2, 2)


def test_everything_the_code_needs_is_saved_with_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    shipped = {path.name for path in Path(whisper_hf.model.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == shipped
    assert list(tmp_path.glob("*.md")) == []  # the guide beside the code stays behind
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    assert all(reference.split(".")[0] + ".py" in shipped for reference in auto_map.values())


def test_with_the_plugin_no_trust_is_needed(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is whisper_hf.WhisperLMForCausalLM
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
