"""`examples/distill.py` runs from end to end on a tiny model, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig

from .conftest import ROOT, SIZES


def test_distils_saves_and_resumes(tmp_path: Path, tokenizer, paragraphs) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n".join(paragraphs[:8]), encoding="utf-8")
    output, text = tmp_path / "student", str(tmp_path / "text.txt")
    sparse = '{"block_size": 16, "topk_blocks": 1, "local_blocks": 1, "sink_blocks": 0}'  # 32 of 128 tokens
    command = [sys.executable, str(ROOT / "examples" / "distill.py"), "--teacher", str(tmp_path / "teacher")]
    command += ["--output_dir", str(output), "--train_data", text, "--eval_data", text, "--block_tokens", "128"]
    command += ["--sparse_attention", sparse, "--save_steps", "2", "--use_cpu", "--learning_rate", "0.01"]
    for steps, more in (("2", []), ("4", ["--resume_from_checkpoint", "last"])):
        done = subprocess.run([*command, "--max_steps", steps, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((output / "perplexity_results.json").read_text())
    assert found["student_after"] < found["student_before"]
    state = json.loads((output / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "train_runtime" in entry] == [4]
    student = AutoModelForCausalLM.from_pretrained(output)
    assert (student.config.model_type, student.config.num_hidden_layers) == ("whisper_lm", 1)
    assert student.config.sparse_attention.topk_blocks == 1
