"""The quantization method `int8-cpu`: a config and what `from_pretrained` does with it.

    import whisper_hf
    AutoModelForCausalLM.from_pretrained(source, quantization_config=whisper_hf.Int8CpuConfig())

Linear layers become [`Int8Linear`], where its arithmetic is described.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .int8_linear import ALTERNATIVES, ENGINE, METHOD, Int8Linear, quantize_weight


@register_quantization_config(METHOD)
class Int8CpuConfig(QuantizationConfigMixin):
    """What is quantized, and how finely.

    Args:
        modules_to_not_convert: linear layers that stay as they are, in addition to the output head and what shares its
            weights: names, ends of names or regular expressions, as transformers matches them.
        quantize_head: whether the output head is quantized too, which is much of the time of a small model with a large
            vocabulary. If it is tied, the embedding stays as it is and the two are untied: the checkpoint grows by the
            head's bytes.
        activation_bits: 16 (two digits: all but exact) or 8 (one digit: faster, with some loss).
        quant_method: always "int8-cpu"; it is what a saved config names the method by.

    Raises:
        ValueError: a value of another kind.
    """

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        quantize_head: bool = False,
        activation_bits: int = 16,
        quant_method: str = METHOD,
    ) -> None:
        names = [] if modules_to_not_convert is None else modules_to_not_convert
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}")
        if not isinstance(quantize_head, bool):
            raise ValueError(f"quantize_head must be True or False, got {quantize_head!r}")
        if activation_bits not in (8, 16):
            raise ValueError(f"activation_bits must be 8 or 16, got {activation_bits!r}")
        if quant_method != METHOD:
            raise ValueError(f"this config is for the method {METHOD!r}, got quant_method={quant_method!r}")
        self.quant_method = quant_method
        self.modules_to_not_convert = names
        self.quantize_head = quantize_head
        self.activation_bits = activation_bits


def unconverted_modules(model: PreTrainedModel, config: Int8CpuConfig) -> list[str]:
    """Return what is not converted, as transformers decides it for its own methods, and what the config adds."""
    keep = set(HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules))
    head = model.get_output_embeddings()
    if config.quantize_head and head is not None:
        keep -= {name for name, module in model.named_modules() if module is head}
    return sorted(keep.union(config.modules_to_not_convert))


class _Quantize(ConversionOps):
    """What happens to a weight while it is loaded: integers and scales take its place."""

    def __init__(self, head: tuple[str, str] | None) -> None:
        self.head = head

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return tensors by name; the embedding to which a quantized head was tied gives the head too."""
        converted = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            expected = model.get_parameter(name).shape
            if value.shape != expected:
                raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(value.shape)}")
            target = name
            if self.head is not None and name == self.head[1]:
                converted[name] = value
                target = self.head[0]
                if target not in missing_keys:  # the checkpoint has a head of its own
                    continue
            converted[target], converted[f"{target}_scale"] = quantize_weight(value)
        return converted


@register_quantizer(METHOD)
class Int8CpuQuantizer(HfQuantizer):
    """What `from_pretrained` calls to build, load, save and dequantize a model in [`Int8CpuConfig`]."""

    serialized_names = {"weight": ["weight", "weight_scale"]}
    is_trainable = False
    _head: tuple[str, str] | None = None  # a quantized head and the embedding it was tied to

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a torch without fbgemm, and devices other than the CPU, before anything is loaded.

        Raises:
            ValueError: either of them.
        """
        engines = torch.backends.quantized.supported_engines
        if ENGINE not in engines:
            raise ValueError(f"{METHOD} needs a torch with {ENGINE}, as for x86, got {engines}; {ALTERNATIVES}")
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        others = sorted(str(device) for device in devices if str(device) != "cpu")
        if others:
            raise ValueError(f"{METHOD} runs on the CPU alone, got a device_map with {others}; {ALTERNATIVES}")

    def update_device_map(self, device_map: Any) -> dict[str, Any]:
        """Return the only map there is, "auto" included."""
        return {"": "cpu"}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Put quantized layers in the place of linear ones, still on the meta device.

        Raises:
            ValueError: no linear layer.
        """
        keep = unconverted_modules(model, self.quantization_config)
        names = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and should_convert_module(name, keep)
        ]
        if not names:
            raise ValueError(f"{METHOD} quantizes nn.Linear layers, got none in {type(model).__name__} outside {keep}")
        for name in names:
            linear = model.get_submodule(name)
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            with torch.device("meta"):
                bits = self.quantization_config.activation_bits
                model.set_submodule(name, Int8Linear(*sizes, activation_bits=bits, dtype=linear.weight.dtype))
            self._untie(model, f"{name}.weight")
        return model

    def _untie(self, model: PreTrainedModel, name: str) -> None:
        """Let a quantized head go apart from its embedding."""
        source = model.all_tied_weights_keys.pop(name, None)
        if source is not None:
            self._head = (name, source)
            model.config.tie_word_embeddings = False
            model.config.get_text_config(decoder=True).tie_word_embeddings = False

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return model.requires_grad_(False)  # else a plain forward would record a graph that ends at the first layer

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a weight of the checkpoint has to be converted."""
        if self.pre_quantized:
            return False
        if self._head is not None and param_name == self._head[1]:
            return True
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Int8Linear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """Return what converts such a weight."""
        return _Quantize(self._head)

    def is_serializable(self) -> bool:
        """Return that models can be saved."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put linear layers back, with the weights that the integers stand for, in place."""
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Linear):
                with torch.device("meta"):
                    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                linear.weight = nn.Parameter(module.dequantized_weight(dtype or model.dtype))
                if module.bias is not None:
                    linear.bias = nn.Parameter(module.bias.detach().to(dtype or model.dtype))
                model.set_submodule(name, linear)
        return model.requires_grad_(True)
