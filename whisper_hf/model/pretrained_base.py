# Copyright 2026 The whisper_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The base of the model classes: load and save checkpoints, distribute a model, and refuse dense attention."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from .attention import MASKED_SPARSE
from .checkpoint_integrity import load_intact, weight_shapes
from .checksums import CHECKSUMS, write_checksums
from .configuration_whisper_lm import WhisperLMConfig

ATTENTION_IMPLEMENTATIONS = (MASKED_SPARSE, "sdpa", "eager")
# plan for heads that processes cannot share evenly: every process computes all heads, from weights that are shared
UNEVEN_HEADS_TP_PLAN = {
    "q_proj": "colwise_gather_output",
    "k_proj": "colwise_gather_output",
    "v_proj": "colwise_gather_output",
    "q_norm": "replicate",
    "k_norm": "replicate",
    "o_proj": "rowwise_split_input",
}
AUTO_MAP = {
    "AutoConfig": "configuration_whisper_lm.WhisperLMConfig",
    "AutoModel": "modeling_whisper_lm.WhisperLMModel",
    "AutoModelForCausalLM": "modeling_whisper_lm.WhisperLMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_whisper_lm.WhisperLMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_whisper_lm.WhisperLMForTokenClassification",
}


def keep_4bit_arrangement(model: Any) -> None:
    """Prevent bitsandbytes from rearranging the 4-bit weights of a model, in place."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _without_fsdp_class(model: Any) -> Iterator[None]:
    """Restore the class of a model while it is saved: FSDP 2 replaces it by one whose code would be saved instead."""
    kind = type(model)
    model.__class__ = next(base for base in kind.__mro__ if not base.__module__.startswith("torch."))
    try:
        yield
    finally:
        model.__class__ = kind


class CheckedPreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` that validates its checkpoints, saves its code with them, and refuses dense attention."""

    config: WhisperLMConfig
    _may_be_new: tuple[str, ...] = ()  # prefixes of the names of weights that a checkpoint may lack

    def __init__(self, config: WhisperLMConfig, *args: Any, **kwargs: Any) -> None:
        """Refuse an unknown quantization, whose weights transformers would load as if they were not quantized.

        Raises:
            ValueError: the checkpoint's quantization needs a package that is not imported.
        """
        quantization = getattr(config, "quantization_config", None)
        if isinstance(quantization, dict) and not AutoHfQuantizer.supports_quant_method(quantization):
            raise ValueError(
                f"the checkpoint is quantized by {quantization['quant_method']!r}, which transformers does not know; "
                "import the package that brings it before loading: int8-cpu comes with `import whisper_hf`"
            )
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        verify_checksums: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does, and refuse weights that are damaged or missing.

        A truncated or missing file and a weight of another shape are always found. A changed byte inside a weight is
        found with `verify_checksums=True`, which hashes all files, for a second per gigabyte and core.

        On CPUs with AVX512-BF16, bitsandbytes (0.50.2) rearranges 4-bit weights when they are first used without
        gradients, for a faster product with few rows. A model that is saved, dequantized or trained after that is
        wrong, so that this is switched off here.

        Args:
            pretrained_model_name_or_path: folder or Hub id; `None` for weights from memory.
            verify_checksums: compare the files with the `SHA256SUMS` beside them.
            args, kwargs: the arguments of transformers' own method.

        Raises:
            ValueError: weights that are damaged, missing or of another shape (see [`load_intact`]), or, with
                `verify_checksums`, that have changed since they were saved or have no `SHA256SUMS`.
            OSError: the checkpoint does not exist.
        """
        source, load = pretrained_model_name_or_path, super().from_pretrained
        if source is None:
            if verify_checksums:
                raise ValueError("verify_checksums=True needs a folder or Hub id, got None; leave out verify_checksums")
            loaded = load(None, *args, **kwargs)
        else:

            def shapes() -> dict[str, torch.Size]:
                config = kwargs.get("config")
                if not isinstance(config, PreTrainedConfig):
                    config, _ = cls.config_class.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
                return weight_shapes(cls, config)

            loaded = load_intact(
                load,
                source,
                *args,
                may_be_new=cls._may_be_new,
                shapes=shapes,
                verify_checksums=verify_checksums,
                **kwargs,
            )
        keep_4bit_arrangement(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Default to `masked_sparse`, and accept only implementations that compute the same function.

        Raises:
            ValueError: any other implementation, such as vLLM's, which would silently attend densely.
        """
        implementation = requested_attention or MASKED_SPARSE
        if implementation in ATTENTION_IMPLEMENTATIONS:
            return implementation
        raise ValueError(
            f'Specified `attn_implementation="{implementation}"` is not supported: {type(self).__name__} computes '
            f"masked sparse attention with one of {ATTENTION_IMPLEMENTATIONS}; use one of these, or convert the model "
            "by whisper_hf.to_dense(model) for software that attends densely, such as vLLM"
        )

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: DistributedConfig | None, mesh_manager: Any) -> Any:
        """Distribute a model by its tensor-parallel plan, or by another plan where heads do not divide evenly."""
        if distributed_config is not None and model.config.num_key_value_heads % distributed_config.tp_size:
            plan = model.tp_plan.items()
            model.tp_plan = {name: UNEVEN_HEADS_TP_PLAN.get(name.rpartition(".")[2], style) for name, style in plan}
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save a model as transformers does, and add its code, an `auto_map` for every Auto class, and checksums."""
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        is_worker = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        is_main = kwargs.get("is_main_process", True) and not is_worker
        if is_main:
            Path(save_directory, CHECKSUMS).unlink(missing_ok=True)  # they describe files that are about to change
        with _without_fsdp_class(self):
            super().save_pretrained(save_directory, **kwargs)
        if is_main:
            write_checksums(save_directory)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        write_checksums(working_dir)  # before the upload with which `save_pretrained` may end
        return super()._upload_modified_files(working_dir, *args, **kwargs)
