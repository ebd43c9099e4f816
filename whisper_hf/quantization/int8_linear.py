"""A linear layer with 8-bit integer weights, which decodes faster than float32 on a CPU.

Weights have one scale per output channel. Activations have one scale per token, and one or two digits of 8 bits. The
dynamic quantization of torch has one scale for a whole tensor. This ruins a language model, as a few channels of a few
tokens are far larger than the rest. The perplexity of SmolLM2-135M on 1,024 tokens rises as follows, against float32:

    one scale per tensor, 8 bits              + 55 %
    one scale per token, one digit (8 bits)   + 0.7 %
    one scale per token, two digits (16 bits) + 0.01 %

The two digits of a token are two rows of one product. With few tokens, reading the weights takes most of the time, so
decoding becomes faster. A long prompt with two digits takes longer than in float32.

fbgemm computes the products, through `torch.ops.quantized.linear_prepack`, `linear_unpack` and `linear_dynamic`;
`torch.ao.quantization` is not used. The first two operators take and return tensors of the dtype `qint8`, whose removal
torch 2.13 announces (https://github.com/pytorch/pytorch/issues/184982). Checkpoints hold plain int8 tensors and do not
depend on that dtype.

Legend: `M` rows (tokens of all sequences), `I` input features, `O` output features.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

METHOD = "int8-cpu"
ENGINE = "fbgemm"
ROWS = 64  # largest number of rows in one product: the operands of larger ones would not fit into the CPU's caches
ALTERNATIVES = "the recipes 'int8' and 'nf4' (bitsandbytes) run on other devices, and train adapters"


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to integers in [-127, 127] with a scale for each output channel.

    Args:
        weight: `[O, I]`, any floating dtype.

    Returns:
        integers `[O, I]`, int8, and scales `[O]`, float32; `integers * scales[:, None]` differs from the weight by at
        most half a scale.

    Raises:
        ValueError: weights that are not finite.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    if not scale.isfinite().all():
        raise ValueError(
            f"weights must be finite, got NaN or infinity in a matrix of shape {tuple(weight.shape)}; "
            "load an intact model"
        )
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer `[..., I] -> [..., O]` with 8-bit weights, for inference on a CPU.

    Its parameters are `weight` (int8, `[O, I]`), `weight_scale` (float32, `[O]`, also if the model is cast to another
    dtype) and `bias` (`[O]`, or `None`). The first forward pass packs the weight into fbgemm's own arrangement and puts
    the plain parameter on the meta device, so that memory holds the weight once. `state_dict`, copies, `.to()` and
    `int8_weight()` restore the plain weight. A weight or scale that is replaced is packed again.

    Rows do not depend on one another, bit for bit, with one exception: with 8 bits, a row alone in its batch is rounded
    slightly differently. A row that contains NaN or infinity gives NaN or infinity.

    Args:
        in_features: `I`.
        out_features: `O`.
        bias: whether the layer has a bias.
        activation_bits: 8 or 16, see [`Int8CpuConfig`].
        dtype: dtype of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_bits: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation_bits = activation_bits
        self.weight = _constant(torch.zeros(out_features, in_features, dtype=torch.int8))
        self.weight_scale = _constant(torch.ones(out_features, dtype=torch.float32))
        self.bias = _constant(torch.zeros(out_features, dtype=dtype)) if bias else None
        self._packed: Any = None
        self._row_sums: Any = None  # `[O]`, float32: sum over I of the dequantized weight
        self._packed_scale: tuple[Tensor, int] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation_bits: int = 16) -> "Int8Linear":
        """Return a quantized copy of a linear layer, which does not change."""
        dtype = linear.weight.dtype
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, activation_bits, dtype)
        weight, scale = quantize_weight(linear.weight)
        layer.weight = _constant(weight)
        layer.weight_scale = _constant(scale)
        if linear.bias is not None:
            layer.bias = _constant(linear.bias.detach().clone())
        return layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to `[..., I]`, and return `[..., O]` in the dtype of the input, computed in float32.

        Args:
            hidden_states: `[..., I]`, any floating dtype, on the CPU.

        Raises:
            ValueError: an input on another device, or an input that needs a gradient.
        """
        self._refuse(hidden_states)
        if self._packed is None or not self.weight.is_meta or not self._scale_is_packed():
            self._pack()
        rows = hidden_states.reshape(-1, self.in_features).float()
        if len(rows) > ROWS:
            product = torch.cat([self._multiply(chunk) for chunk in rows.split(ROWS)])
        else:
            product = self._multiply(rows)
        if self.bias is not None:
            product = product + self.bias
        return product.to(hidden_states.dtype).view(*hidden_states.shape[:-1], self.out_features)

    def _refuse(self, hidden_states: Tensor) -> None:
        """Refuse an input that is not on the CPU, or that needs a gradient."""
        if hidden_states.device.type != "cpu":
            raise ValueError(f"{METHOD} runs on the CPU alone, got a tensor on {hidden_states.device}; {ALTERNATIVES}")
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{METHOD} is for inference, got an input that needs a gradient; use torch.no_grad(); {ALTERNATIVES}"
            )

    def _multiply(self, rows: Tensor) -> Tensor:
        """Multiply rows `[M, I]`, float32, by the weight, with a scale for each row; return `[M, O]`, float32.

        fbgemm quantizes all rows of a product with one scale. So each row is mapped to the range [0, largest] before
        the product, where this scale is 1, and the product is mapped back:

            digits   =  round((row - low) / step)
            product  =  step * (digits @ weight.T) + low * row_sums
        """
        if self.activation_bits == 8 and len(rows) == 1 and math.isfinite(rows.sum().item()):
            return self._product(rows)  # fbgemm's one scale is this row's own; it would ignore a NaN, hence the check
        largest = 127 if _saturates() else 255
        low, high = torch.aminmax(rows, dim=-1, keepdim=True)
        # a slightly smaller step: rounding then leaves no row's maximum below `largest`
        step = high.sub(low).div_(largest * (1 + 1e-6)).clamp_min_(1e-30)
        if self.activation_bits == 8:
            # `low` becomes a multiple of `step`, so that zero is exact: most channels are near zero, and they would
            # share a rounding error, which would add up
            low = high.div_(step).round_().sub_(largest).mul_(step)
            digits = rows.sub(low).div_(step).nan_to_num_(0.0).round_().clamp_(0, largest)
            product = self._product(digits)
        else:
            scaled = rows.sub(low).div_(step).nan_to_num_(0.0)  # a NaN would affect all rows; `step` keeps it
            rest = scaled.frac().mul_(largest)
            digits, rest = self._product(torch.cat((scaled.floor_(), rest))).chunk(2)
            product = digits.add(rest, alpha=1 / largest)
        return product.mul_(step).addcmul_(low, self._row_sums)

    def _product(self, rows: Tensor) -> Tensor:
        """Multiply rows `[M, I]`, float32, by the weight, with one scale for all rows; return `[M, O]`, float32."""
        return torch.ops.quantized.linear_dynamic(rows, self._packed, reduce_range=_saturates())

    @torch.inference_mode(False)
    def _pack(self) -> None:
        """Pack the weight into fbgemm's own arrangement, and release the plain weight."""
        weight = self.int8_weight()
        scale = self.weight_scale
        if weight.device.type != "cpu" or scale.device.type != "cpu":
            raise ValueError(f"{METHOD} needs its weights on the CPU, got {weight.device}; load or move the model")
        with _engine(), _quiet():
            zeros = torch.zeros(self.out_features, dtype=torch.long)
            channels = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.detach().double(), zeros, 0)
            packed = torch.ops.quantized.linear_prepack(channels, None)
        self._row_sums = weight.sum(1) * scale.detach()
        self._packed_scale = (scale, _version(scale))
        self._packed = packed  # set before the plain weight is released, which other threads may be reading
        self.weight = _constant(torch.empty_like(weight, device="meta"))

    @torch.inference_mode(False)
    def _unpack(self) -> None:
        """Restore the plain weight, as it was loaded."""
        self.weight = _constant(self.int8_weight())
        self._packed = None

    def _scale_is_packed(self) -> bool:
        """Return whether the weight was packed with the scale that the layer has now."""
        tensor, version = self._packed_scale or (None, 0)
        return tensor is self.weight_scale and version == _version(self.weight_scale)

    def int8_weight(self) -> Tensor:
        """Return the quantized weight as integers `[O, I]`, int8."""
        if self._packed is None or not self.weight.is_meta:
            return self.weight.detach()
        with _quiet():
            return torch.ops.quantized.linear_unpack(self._packed)[0].int_repr()

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized weight `[O, I]`, integers times scales, in a dtype."""
        return (self.int8_weight() * self.weight_scale.detach()[:, None]).to(dtype)

    def extra_repr(self) -> str:
        """Return the description of the layer that `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation_bits={self.activation_bits}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        self._unpack()
        scale = self.weight_scale.detach()
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:  # undo the cast of the scale, which would change all weights
            self.weight_scale = _constant(scale.to(self.weight_scale.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.int8_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != torch.int8:
            raise ValueError(
                f"{prefix}weight must be int8 with a scale, got {weight.dtype}; load it with from_pretrained, which "
                "quantizes it"
            )
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, with the plain weight instead of the packed one."""
        parameters = {**self._parameters, "weight": _constant(self.int8_weight())}
        return {**self.__dict__, "_parameters": parameters, "_packed": None, "_row_sums": None, "_packed_scale": None}


def _constant(tensor: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def _version(tensor: Tensor) -> int:
    """Return the counter of in-place changes of a tensor, or 0 for an inference tensor, which has none."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _engine() -> Iterator[None]:
    """Make `linear_prepack` pack for fbgemm; products follow the packing and do not depend on the engine."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warning that the dtype qint8 will be removed; the docstring of this file states it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        yield


@functools.cache
def _saturates() -> bool:
    """Return whether fbgemm's products overflow with 8-bit activations on this CPU.

    Without AVX512-VNNI, fbgemm adds pairs of products in 16-bit integers. These hold 2 x 127 x 127, but not
    2 x 255 x 127, so a digit of an activation then gets 7 bits (`reduce_range`). The function computes a product
    instead of reading the CPU's features, because it depends on the kernel that fbgemm chooses.
    """
    layer = Int8Linear(64, 32, bias=False)
    layer.weight = _constant(torch.full((32, 64), 127, dtype=torch.int8))
    layer._pack()
    product = torch.ops.quantized.linear_dynamic(torch.full((1, 64), 255.0), layer._packed, reduce_range=False)
    return bool((product != 255 * 127 * 64).any())
