"""A linear layer whose weights are read as 8-bit integers, faster than float32 on a CPU.

Weights get a scale for each output channel. Activations get a scale for each token, and one or two digits of 8 bits: a
few channels of a few tokens are so much larger than the rest that a scale for a whole tensor, which torch's own dynamic
quantization has, ruins a language model (perplexity of SmolLM2-135M on 1,024 tokens: + 55 %; with a scale for each
token + 0.7 %, with two digits + 0.01 %). The two digits of a token are two rows of one product: while tokens are few,
time goes into reading the weights, and decoding gains; a long prompt takes longer than in float32, unless one digit is
enough.

Products are computed by fbgemm, through `torch.ops.quantized.linear_prepack`, `linear_unpack` and `linear_dynamic`;
nothing of `torch.ao.quantization` is used. The first two take and give tensors of the dtype `qint8`, which torch 2.13
announces to remove (https://github.com/pytorch/pytorch/issues/184982): checkpoints hold plain tensors and outlive it.

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
ROWS = 64  # multiplied at once: more would leave the caches
ALTERNATIVES = "the recipes 'int8' and 'nf4' (bitsandbytes) run on other devices, and train adapters"


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to integers in [-127, 127] with a scale for each output channel.

    Args:
        weight: `[O, I]`, any floating dtype.

    Returns:
        integers `[O, I]`, int8, and scales `[O]`, float32; their product is the weight, up to half a scale.

    Raises:
        ValueError: weights that are not finite.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    if not scale.isfinite().all():
        raise ValueError(f"weights must be finite, got NaN or infinity in a matrix of shape {tuple(weight.shape)}")
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer `[..., I] -> [..., O]` for inference on a CPU, with weights of 8 bits.

    It holds `weight` (int8, `[O, I]`), `weight_scale` (float32, `[O]`, whatever the model is cast to) and `bias`
    (`[O]`, or none). When it is first used, fbgemm's own arrangement takes the place of the plain weight, whose
    parameter then lies on the meta device, so that memory holds the weights once. `state_dict`, copies and `.to()` have
    the plain weight again; so does `int8_weight()`. A new weight or scale is arranged anew.

    Rows do not depend on one another, bit for bit; but with 8 bits, one that comes alone is rounded a little otherwise.
    A row with NaN or infinity gives NaN or infinity.

    Args:
        in_features: `I`.
        out_features: `O`.
        bias: whether there is one.
        activation_bits: 8 or 16, see [`Int8CpuConfig`].
        dtype: of the bias.
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
        self.in_features, self.out_features, self.activation_bits = in_features, out_features, activation_bits
        self.weight = _constant(torch.zeros(out_features, in_features, dtype=torch.int8))
        self.weight_scale = _constant(torch.ones(out_features, dtype=torch.float32))
        self.bias = _constant(torch.zeros(out_features, dtype=dtype)) if bias else None
        self._packed: Any = None
        self._row_sums: Any = None  # `[O]`, float32
        self._packed_scale: tuple[Tensor, int] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation_bits: int = 16) -> "Int8Linear":
        """Quantize a linear layer, which stays as it is."""
        dtype = linear.weight.dtype
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, activation_bits, dtype)
        weight, scale = quantize_weight(linear.weight)
        layer.weight, layer.weight_scale = _constant(weight), _constant(scale)
        if linear.bias is not None:
            layer.bias = _constant(linear.bias.detach().clone())
        return layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Multiply `[..., I]` of any floating dtype; `[..., O]` has the same dtype, computed in float32.

        Raises:
            ValueError: an input on another device or that needs a gradient.
        """
        self._refuse(hidden_states)
        if self._packed is None or not self.weight.is_meta or not self._scale_is_packed():
            self._pack()
        rows = hidden_states.reshape(-1, self.in_features).float()
        if len(rows) > ROWS:
            product = torch.cat([self._multiply(some) for some in rows.split(ROWS)])
        else:
            product = self._multiply(rows)
        if self.bias is not None:
            product = product + self.bias
        return product.to(hidden_states.dtype).view(*hidden_states.shape[:-1], self.out_features)

    def _refuse(self, hidden_states: Tensor) -> None:
        if hidden_states.device.type != "cpu":
            raise ValueError(f"{METHOD} runs on the CPU alone, got a tensor on {hidden_states.device}; {ALTERNATIVES}")
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{METHOD} is for inference, got an input that needs a gradient; use torch.no_grad(); {ALTERNATIVES}"
            )

    def _multiply(self, rows: Tensor) -> Tensor:
        """Return the product `[M, O]`, float32, of `[M, I]`, float32.

        fbgemm's own quantization has one scale for all rows that it is given. So each row is brought to the range from
        0 to `largest` before, which makes that scale 1, and back after.
        """
        if self.activation_bits == 8 and len(rows) == 1 and math.isfinite(rows.sum().item()):
            return self._product(rows)  # a scale for all is a scale for each; fbgemm would overlook a NaN
        largest = 127 if _saturates() else 255
        low, high = torch.aminmax(rows, dim=-1, keepdim=True)
        step = high.sub(low).div_(largest * (1 + 1e-6)).clamp_min_(1e-30)  # a little less, so that no row ends below
        if self.activation_bits == 8:
            # zero stays zero: most channels are near it, and an error that they share would add up
            low = high.div_(step).round_().sub_(largest).mul_(step)
            digits = rows.sub(low).div_(step).nan_to_num_(0.0).round_().clamp_(0, largest)
            product = self._product(digits)
        else:
            scaled = rows.sub(low).div_(step).nan_to_num_(0.0)  # spares other rows; the step is NaN too
            rest = scaled.frac().mul_(largest)
            digits, rest = self._product(torch.cat((scaled.floor_(), rest))).chunk(2)
            product = digits.add(rest, alpha=1 / largest)
        return product.mul_(step).addcmul_(low, self._row_sums)

    def _product(self, rows: Tensor) -> Tensor:
        """Return fbgemm's product `[M, O]`, float32, of `[M, I]`, float32, quantized with one scale."""
        return torch.ops.quantized.linear_dynamic(rows, self._packed, reduce_range=_saturates())

    @torch.inference_mode(False)
    def _pack(self) -> None:
        """Let fbgemm arrange the weights, and drop the plain ones."""
        weight, scale = self.int8_weight(), self.weight_scale
        if weight.device.type != "cpu" or scale.device.type != "cpu":
            raise ValueError(f"{METHOD} needs its weights on the CPU, got {weight.device}; load or move the model")
        with _engine(), _quiet():
            zeros = torch.zeros(self.out_features, dtype=torch.long)
            channels = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.detach().double(), zeros, 0)
            packed = torch.ops.quantized.linear_prepack(channels, None)
        self._row_sums = weight.sum(1) * scale.detach()
        self._packed_scale = (scale, _version(scale))
        self._packed = packed  # before the plain weight goes, for other threads
        self.weight = _constant(torch.empty_like(weight, device="meta"))

    @torch.inference_mode(False)
    def _unpack(self) -> None:
        """Bring back the plain weight, as it was loaded."""
        self.weight, self._packed = _constant(self.int8_weight()), None

    def _scale_is_packed(self) -> bool:
        tensor, version = self._packed_scale or (None, 0)
        return tensor is self.weight_scale and version == _version(self.weight_scale)

    def int8_weight(self) -> Tensor:
        """Return the integers `[O, I]`, int8."""
        if self._packed is None or not self.weight.is_meta:
            return self.weight.detach()
        with _quiet():
            return torch.ops.quantized.linear_unpack(self._packed)[0].int_repr()

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `[O, I]` that the integers stand for."""
        return (self.int8_weight() * self.weight_scale.detach()[:, None]).to(dtype)

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation_bits={self.activation_bits}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        self._unpack()
        scale = self.weight_scale.detach()
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:  # cast with the model: that would change all weights
            self.weight_scale = _constant(scale.to(self.weight_scale.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.int8_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != torch.int8:
            raise ValueError(
                f"{prefix}weight must be int8 with a scale, got {weight.dtype}; from_pretrained quantizes as it loads"
            )
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies are made of: the plain weight in place of fbgemm's."""
        parameters = {**self._parameters, "weight": _constant(self.int8_weight())}
        return {**self.__dict__, "_parameters": parameters, "_packed": None, "_row_sums": None, "_packed_scale": None}


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _engine() -> Iterator[None]:
    """Let `linear_prepack` arrange for fbgemm; products go by what was arranged, whatever the engine is then."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop torch's warning that the dtype qint8 will be removed, which this module's docstring passes on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        yield


@functools.cache
def _saturates() -> bool:
    """Return whether fbgemm's products are wrong for large activations on this CPU.

    Without AVX512-VNNI it adds pairs of products in 16 bits, which hold 2 x 127 x 127 but not 2 x 255 x 127, so
    activations then get 7 bits a digit (`reduce_range`). Tried out rather than looked up: what counts is what it does.
    """
    layer = Int8Linear(64, 32, bias=False)
    layer.weight = _constant(torch.full((32, 64), 127, dtype=torch.int8))
    layer._pack()
    product = torch.ops.quantized.linear_dynamic(torch.full((1, 64), 255.0), layer._packed, reduce_range=False)
    return bool((product != 255 * 127 * 64).any())
