"""transformers' own common tests of models, configs and training, run against our classes.

Run only these with `pytest tests/model/test_transformers_common.py -rs`, one variant with `-k SparseLayers` and one
test with `-k "SparseLayers and test_save_load"`. The first run downloads the source distribution of the installed
transformers (see `transformers_sources.py`); where that is impossible, all of them are skipped.
"""

import tempfile
import unittest
from collections import OrderedDict
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from transformers import set_seed
from transformers.testing_utils import torch_device

from whisper_hf import (
    SparseAttentionConfig,
    WhisperLMConfig,
    WhisperLMForCausalLM,
    WhisperLMForSequenceClassification,
    WhisperLMForTokenClassification,
    WhisperLMModel,
)

from ..conftest import LENGTH, SPARSE, VOCABULARY, tiny_config
from ..helpers.transformers_sources import SourcesUnavailableError, import_common_tests

pytest.importorskip("parameterized", reason="transformers' tests need the package `parameterized`")
try:
    modeling, training, configuration = import_common_tests(
        "test_modeling_common", "test_training_mixin", "test_configuration_common"
    )
except SourcesUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

# These tests look a class up by name to decide whether it takes labels, and which; they pass in silence over a class
# that is in no table. Only they see these copies.
for table, model_class in {
    "MODEL_MAPPING_NAMES": WhisperLMModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": WhisperLMForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": WhisperLMForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": WhisperLMForTokenClassification,
}.items():
    entry = {WhisperLMConfig.model_type: model_class.__name__}
    setattr(modeling, table, OrderedDict(getattr(modeling, table), **entry))

NOT_APPLICABLE: dict[str, str] = {
    "test_attn_implementation_composite_models": "the model has one part",
    "test_can_load_from_already_mapped_keys": "no checkpoint key is renamed on loading",
    "test_can_set_attention_dynamically_composite_model": "the model has one part",
    "test_eager_matches_batched_and_grouped_inference_*": "the model has no experts",
    "test_encoder_decoder_loss_no_double_shift": "the model has no encoder",
    "test_flash_attn_*": "flash attention has no block-sparse masks, so the model refuses it",
    "test_flex_attention_with_grads": "the model refuses attention that is not one of its own three",
    "test_generation_tester_mixin_inheritance": "asks for the generation tests, which the source distribution lacks",
    "test_get_*_features_*": "the model has no tower of any modality (the tests would pass unchecked)",
    "test_internal_model_config_and_subconfig_are_same": "the config has no sub-config",
    "test_keep_in_fp32_modules*": "no module is kept in float32",
    "test_model_rope_with_partial_rotation": "RoPE rotates all of a head",
    "test_moe_models_record_router_logits": "the model has no experts",
    "test_output_router_logits_from_config": "the model has no experts",
    "test_resize_position_vector_embeddings": "RoPE has no embeddings to resize",
    "test_reverse_loading_mapping": "no checkpoint key is renamed on loading",
    "test_sdpa_can_dispatch_composite_models": "the model has one part",
    "test_sdpa_can_dispatch_on_flash": "block-sparse masks rule out PyTorch's flash kernel",
    "test_sliding_window_mask": "the config has no sliding window",
    "test_vision_axial_rope": "the model has no image tower",
}


class ModelTester:
    """Tiny configs and batches, in the form in which transformers' tests ask for them."""

    is_training = True
    causal_lm_class = WhisperLMForCausalLM
    batch_size = 3
    seq_length = LENGTH

    def __init__(self, **overrides: Any) -> None:
        self.overrides = overrides
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> WhisperLMConfig:
        """Return a config of two layers."""
        return tiny_config(**self.overrides)

    def prepare_config_and_inputs_for_common(self) -> tuple[WhisperLMConfig, dict[str, torch.Tensor]]:
        """Return a config and a batch (`[B, T]`) of a full, a left-padded and a right-padded row."""
        attention_mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.int64)
        attention_mask[1, :13] = 0
        attention_mask[2, -21:] = 0
        input_ids = torch.randint(3, VOCABULARY, attention_mask.shape) * attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.get_config(), {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class CommonTests(modeling.ModelTesterMixin, training.TrainingTesterMixin):
    """What both variants share; a test that skips itself without being listed in `NOT_APPLICABLE` fails."""

    overrides: dict[str, Any]
    all_model_classes: tuple[type, ...] = (
        WhisperLMModel,
        WhisperLMForCausalLM,
        WhisperLMForSequenceClassification,
        WhisperLMForTokenClassification,
    )
    model_tester: ModelTester
    test_can_init_all_missing_weights_before_2023 = True  # whatever year the file's header names
    training_overfit_seq_length = LENGTH
    training_overfit_steps = 50
    training_overfit_learning_rate = 3e-3  # three times their own, for a sixth of their steps
    _torch_compile_train_cls = WhisperLMForCausalLM

    def setUp(self) -> None:
        """Skip what is listed, and make the rest deterministic."""
        for pattern, reason in NOT_APPLICABLE.items():
            if fnmatch(self._testMethodName, pattern):
                super().skipTest(reason)
        if self._testMethodName.endswith("_output_attentions"):
            # transformers' classification heads annotate their arguments with a string, in which the test does not
            # find `output_attentions`; it then skips itself
            self.all_model_classes = (WhisperLMModel, WhisperLMForCausalLM)
        if self._testMethodName == "test_bc_cache_name_forward":  # transformers' token classifier returns no cache
            self.all_model_classes = (WhisperLMModel, WhisperLMForCausalLM, WhisperLMForSequenceClassification)
        overrides = dict(self.overrides)
        if "_fp16_" in self._testMethodName or "_bf16_" in self._testMethodName:
            # half precision rounds differently in `eager` and `sdpa`, which tips the choice between blocks of nearly
            # equal score for a few tokens in a thousand; without chosen blocks the pattern is still sparse
            overrides["sparse_attention"] = {**SPARSE, "topk_blocks": 0}
        set_seed(0)
        modeling.global_rng.seed(0)
        # some tests print whole tensors into the messages of assertions that hold
        torch.set_printoptions(threshold=1, edgeitems=1)
        self.addCleanup(torch.set_printoptions, profile="default")
        self.model_tester = ModelTester(**overrides)

    def skipTest(self, reason: str) -> None:
        """Refuse to be skipped."""
        self.fail(f"skips itself, but is not listed in NOT_APPLICABLE: {reason}")

    def test_config(self) -> None:
        """transformers' `ConfigTester`."""
        fields = {"num_hidden_layers": 2, "hidden_size": 72, "sparse_attention": SPARSE, **self.overrides}
        configuration.ConfigTester(self, WhisperLMConfig, **fields).run_common_tests()

    def test_every_head_gets_labels(self) -> None:
        """The tables know all classes, so that the training tests leave none out."""
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            prepared = self._prepare_for_class(inputs, model_class, return_labels=True)
            assert ("labels" in prepared) == (model_class is not WhisperLMModel), model_class.__name__

    def test_attention_is_sparse_where_it_should_be(self) -> None:
        """The batch of the common tests is long enough for the sparse layers to leave tokens out."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = WhisperLMModel(config).to(torch_device).eval()
        settings = SparseAttentionConfig.from_value(config.sparse_attention)
        budget = settings.budget_blocks * settings.block_size
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        for layer_type, weights in zip(config.layer_types, attentions, strict=True):
            attended = int((weights > 0).sum(-1).max())
            assert attended == (budget if layer_type == "masked_sparse_attention" else LENGTH)

    def test_sdpa_can_dispatch_non_composite_models(self) -> None:
        """In the place of transformers' test, for which the default is `sdpa`."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            with tempfile.TemporaryDirectory() as directory:
                model_class(config).save_pretrained(directory)
                for requested in (None, "masked_sparse", "sdpa", "eager"):
                    model = model_class.from_pretrained(directory, attn_implementation=requested)
                    found = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
                    assert found == {requested or "masked_sparse"}, model_class.__name__


class TestSparseLayers(CommonTests, unittest.TestCase):
    """Every layer attends sparsely; one matrix for input and output embeddings."""

    overrides = {"layer_types": ["masked_sparse_attention"] * 2, "tie_word_embeddings": True}


class TestMixedLayers(CommonTests, unittest.TestCase):
    """A layer of each type, with biases and two embedding matrices."""

    overrides = {
        "layer_types": ["full_attention", "masked_sparse_attention"],
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    }


def test_not_applicable_names_tests() -> None:
    """Each entry of the table still names a test."""
    names = [name for name in dir(TestSparseLayers) if name.startswith("test_")]
    assert [pattern for pattern in NOT_APPLICABLE if not any(fnmatch(name, pattern) for name in names)] == []
