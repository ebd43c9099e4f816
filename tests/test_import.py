"""Importing the package is light, registers what it should and shadows nothing."""

import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING, WhisperConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import whisper_hf

IMPORTS = """
import sys
import transformers.models.llama.modeling_llama  # brings triton along where it is installed, as torch._dynamo does
before = set(sys.modules)
import whisper_hf
new = set(sys.modules) - before
print(*sorted({name.partition(".")[0] for name in new}), *(n for n in new if n.startswith("whisper_hf.")))
"""


def test_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert "whisper_hf" in done.stdout.split()
    heavy = {"bitsandbytes", "peft", "datasets", "triton", "gguf", "whisper_hf.distillation", "whisper_hf.conversion"}
    assert not heavy & set(done.stdout.split())


def test_public_names_exist() -> None:
    for name in whisper_hf.__all__:
        assert getattr(whisper_hf, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = whisper_hf.nonsense


def test_both_interfaces_know_the_attention() -> None:
    assert "masked_sparse" in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert "masked_sparse" in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()


def test_the_speech_model_is_left_alone() -> None:
    assert CONFIG_MAPPING["whisper"] is WhisperConfig
    assert CONFIG_MAPPING["whisper_lm"] is whisper_hf.WhisperLMConfig
