"""Importing the package is light, registers what it should and shadows nothing."""

import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING, WhisperConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import whisper_hf


@pytest.mark.parametrize("heavy", ["bitsandbytes", "peft", "datasets", "triton"])
def test_import_is_light(heavy: str) -> None:
    code = f"import sys, whisper_hf; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
