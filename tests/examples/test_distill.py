"""`examples/distill.py` runs from end to end on a tiny model, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig

from examples import distill

from ..conftest import ROOT, SIZES


def losses(state: dict[str, Any]) -> list[float]:
    """Return the losses of all steps up to a checkpoint."""
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def mark_first_loss(path: Path) -> list[float]:
    """Give the first step of a checkpoint a loss that no training has, and return the losses."""
    state = json.loads(path.read_text())
    next(entry for entry in state["log_history"] if "loss" in entry)["loss"] = 1234.5
    path.write_text(json.dumps(state))
    return losses(state)


def test_distils_saves_and_resumes(tmp_path: Path, tokenizer, paragraphs, monkeypatch) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n".join(paragraphs[:8]), encoding="utf-8")
    output, text = tmp_path / "student", str(tmp_path / "text.txt")
    sparse = '{"block_size": 16, "topk_blocks": 1, "local_blocks": 1, "sink_blocks": 0}'  # 32 of 128 tokens
    command = [sys.executable, str(ROOT / "examples" / "distill.py"), "--teacher", str(tmp_path / "teacher")]
    command += ["--output_dir", str(output), "--train_data", text, "--eval_data", text, "--block_tokens", "128"]
    command += ["--sparse_attention", sparse, "--save_steps", "2", "--use_cpu", "--learning_rate", "0.01"]
    command += ["--logging_steps", "1", "--resume_from_checkpoint", "last"]  # of which there is none at first
    monkeypatch.setattr(sys, "argv", [*command[1:], "--max_steps", "2"])
    distill.main()
    begun = mark_first_loss(output / "checkpoint-2" / "trainer_state.json")
    done = subprocess.run([*command, "--max_steps", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Failed to load CPU" not in done.stderr
    found = json.loads((output / "perplexity_results.json").read_text())
    assert found["student_after"] < found["student_before"]
    table = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[-4:-1]]
    names = ("teacher", "student before", "student after")
    assert table == [[name, f"{found[name.replace(' ', '_')]:.2f}"] for name in names]
    assert losses(json.loads((output / "trainer_state.json").read_text()))[:2] == begun  # these steps were not repeated
    student = AutoModelForCausalLM.from_pretrained(output)
    assert (student.config.model_type, student.config.num_hidden_layers) == ("whisper_lm", 1)
    assert student.config.sparse_attention.topk_blocks == 1
