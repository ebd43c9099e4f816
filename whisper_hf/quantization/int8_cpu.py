"""The quantization method `int8-cpu`: its config, and the quantizer by which `from_pretrained` applies it.

    import whisper_hf
    AutoModelForCausalLM.from_pretrained(source, quantization_config=whisper_hf.Int8CpuConfig())

Each linear layer becomes an [`Int8Linear`], whose file describes the arithmetic.
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
    """The settings of the method `int8-cpu`: which layers it quantizes, and the precision of their inputs.

    Args:
        modules_to_not_convert: linear layers to leave in full precision, in addition to the output head and the layers
            that share its weights. Each entry is a name, the end of a name or a regular expression, as transformers
            matches them.
        quantize_head: whether to quantize the output head too, which takes much of the time of a small model with a
            large vocabulary. A tied head is untied from the embedding, which stays in full precision, and the
            checkpoint grows by the bytes of the head.
        activation_bits: 16 (two digits of 8 bits, almost exact) or 8 (one digit, faster, with some loss).
        quant_method: always "int8-cpu"; transformers finds the method of a saved config by this name.

    Raises:
        ValueError: a value of the wrong type or outside its range.
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
            raise ValueError(
                f"modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}; put one name in []"
            )
        if not isinstance(quantize_head, bool):
            raise ValueError(f"quantize_head must be True or False, got {quantize_head!r}; leave it out for False")
        if activation_bits not in (8, 16):
            raise ValueError(f"activation_bits must be 8 or 16, got {activation_bits!r}; leave it out for 16")
        if quant_method != METHOD:
            raise ValueError(
                f"this config is for the method {METHOD!r}, got quant_method={quant_method!r}; leave it out"
            )
        self.quant_method = quant_method
        self.modules_to_not_convert = names
        self.quantize_head = quantize_head
        self.activation_bits = activation_bits


def unconverted_modules(model: PreTrainedModel, config: Int8CpuConfig) -> list[str]:
    """Return the names of modules that stay in full precision: transformers' defaults, and those in the config."""
    keep = set(HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules))
    head = model.get_output_embeddings()
    if config.quantize_head and head is not None:
        keep -= {name for name, module in model.named_modules() if module is head}
    return sorted(keep.union(config.modules_to_not_convert))


class _Quantize(ConversionOps):
    """The conversion of a weight while transformers loads it: integers and scales replace the floats.

    Args:
        head: names of the weights of a quantized head and of the embedding to which it was tied, or `None`.
    """

    def __init__(self, head: tuple[str, str] | None) -> None:
        self.head = head

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the integers `[O, I]` and scales `[O]` of a weight `[O, I]`, by the names of their tensors.

        The embedding to which a quantized head was tied stays in full precision, and the head is quantized from it.

        Raises:
            ValueError: a weight of another shape, or that is not finite.
        """
        converted = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            expected = model.get_parameter(name).shape
            if value.shape != expected:
                raise ValueError(
                    f"{name} must have the shape {tuple(expected)} as in the config, got {tuple(value.shape)}; load "
                    "the checkpoint with its own config"
                )
            target = name
            if self.head is not None and name == self.head[1]:
                converted[name] = value
                target = self.head[0]
                if (
                    target not in missing_keys
                ):  # the checkpoint holds the head too, which is then quantized from its own weight
                    continue
            converted[target], converted[f"{target}_scale"] = quantize_weight(value)
        return converted


@register_quantizer(METHOD)
class Int8CpuQuantizer(HfQuantizer):
    """The quantizer of [`Int8CpuConfig`], by which transformers builds, loads, saves and dequantizes a model."""

    serialized_names = {"weight": ["weight", "weight_scale"]}
    is_trainable = False
    _head: tuple[str, str] | None = None  # names of a quantized head and of the embedding to which it was tied

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a torch without fbgemm, and devices other than the CPU, before anything is loaded.

        Raises:
            ValueError: torch was built without fbgemm, or `device_map` names another device than the CPU.
        """
        engines = torch.backends.quantized.supported_engines
        if ENGINE not in engines:
            raise ValueError(f"{METHOD} needs a torch with {ENGINE}, as for x86, got {engines}; {ALTERNATIVES}")
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        refused = sorted(str(device) for device in devices if str(device) != "cpu")
        if refused:
            raise ValueError(f"{METHOD} runs on the CPU alone, got a device_map with {refused}; {ALTERNATIVES}")

    def update_device_map(self, device_map: Any) -> dict[str, Any]:
        """Return the device map that puts the whole model on the CPU, also in place of "auto"."""
        return {"": "cpu"}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Replace linear layers by quantized layers, on the meta device.

        Raises:
            ValueError: the model has no linear layer to quantize.
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
        """Untie the weight of this name, if it is a tied head, from its embedding."""
        source = model.all_tied_weights_keys.pop(name, None)
        if source is not None:
            self._head = (name, source)
            model.config.tie_word_embeddings = False
            model.config.get_text_config(decoder=True).tie_word_embeddings = False

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return model.requires_grad_(
            False
        )  # otherwise a forward pass without `torch.no_grad()` would be refused by the first quantized layer

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is the weight of a layer to quantize."""
        if self.pre_quantized:
            return False
        if self._head is not None and param_name == self._head[1]:
            return True
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Int8Linear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes a weight while it is loaded."""
        return _Quantize(self._head)

    def is_serializable(self) -> bool:
        """Return `True`: quantized models can be saved."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace quantized layers by linear layers with the dequantized weights, in place."""
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Linear):
                with torch.device("meta"):
                    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                linear.weight = nn.Parameter(module.dequantized_weight(dtype or model.dtype))
                if module.bias is not None:
                    linear.bias = nn.Parameter(module.bias.detach().to(dtype or model.dtype))
                model.set_submodule(name, linear)
        return model.requires_grad_(True)
