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
"""Register attention as a custom operator of PyTorch, with its gradient: opaque to `torch.compile`, exportable.

The shape legend of `sparse_selection.py` applies here.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def operator_namespace(module: str) -> str:
    """Return the namespace for the operators of a module, from its `__name__`.

    A copy of the module that is loaded as remote code has another name, and so registers operators of its own.
    """
    return re.sub(r"\W", "_", module, flags=re.ASCII)


def register_attention_op(module: str, forward: Forward, backward: Forward, empty_outputs: Forward) -> tuple[Any, Any]:
    """Register a forward and a backward function as the operators `attend` and `attend_backward`.

    Args:
        module (`str`): `__name__` of the calling module.
        forward: `(query, key, value, layout, scaling, block_size, topk_blocks, local_blocks, sink_blocks)` -> output,
            log-sum-exps and chosen blocks. Its annotations are the operator's schema.
        backward: `(gradient of the output, query, key, value, *results of forward, layout, scaling, *sizes)` ->
            gradients of query, key and value, in their shapes and dtypes.
        empty_outputs: `(query, key, value, topk_blocks)` -> uninitialised results of `forward`.

    Returns:
        Both operators. The first is differentiable once; a second derivative raises a `RuntimeError`.
    """
    namespace = operator_namespace(module)
    attend = torch.library.custom_op(f"{namespace}::attend", forward, mutates_args=())
    attend_backward = torch.library.custom_op(f"{namespace}::attend_backward", backward, mutates_args=())

    @attend.register_fake
    def _(
        query: Tensor, key: Tensor, value: Tensor, layout: Any, scaling: Any, block_size: Any, topk: int, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return empty_outputs(query, key, value, topk)

    @attend_backward.register_fake
    def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    def save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
        query, key, value, layout, *numbers = inputs
        ctx.save_for_backward(query, key, value, *output, layout)
        ctx.numbers = numbers

    def differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        grads = attend_backward(grad, *ctx.saved_tensors, *ctx.numbers)
        return (*grads, *[None] * (1 + len(ctx.numbers)))

    attend.register_autograd(differentiate, setup_context=save_for_backward)
    return attend, attend_backward
