"""Compile every Triton kernel for an H100, with or without a GPU, for `test_attention_triton.py`.

    python -m tests.helpers.triton_ahead_of_time HEAD_DIM-GROUPS[-BLOCK_SIZE[-DTYPE]] ...

It prints a JSON object with the resources of each kernel for each of these shapes: registers, bytes of stack (spilled
registers), bytes of shared memory, and warps.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from whisper_hf.model.attention_triton import attention_triton
from whisper_hf.model.configuration_whisper_lm import SparseAttentionConfig
from whisper_hf.model.triton_decode import attention_triton_decode

H100 = GPUTarget("cuda", 90, 32)
DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
resources: dict[str, dict[str, int]] = {}


def compile_instead(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
    """Compile a kernel for its arguments, and record its resources, instead of launching it."""
    name = self.fn.__name__
    if name in resources:
        return
    values = {**dict(zip((param.name for param in self.params), args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(self.params):
        value = values.pop(param.name)
        is_special = not param.do_not_specialize and isinstance(value, int)
        if param.is_constexpr or value is None or (is_special and value == 1):
            signature[param.name], constants[index,] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (is_special and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(self, signature, constants, attributes), target=H100, options=values)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [DUMP, "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", dump))
    resources[name] = {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }


def compile_all(head_dim: str, groups: str, block_size: str = "64", dtype: str = "bfloat16") -> dict:
    """Compile the kernels of forward, backward and decoding, without running them; return their resources by name."""
    JITFunction.run = compile_instead
    resources.clear()
    settings = SparseAttentionConfig(int(block_size), 704 // int(block_size), 256 // int(block_size), 1)
    shapes = [(1, 2048, heads, int(head_dim)) for heads in (2 * int(groups), 2, 2)]
    states = [torch.zeros(shape, dtype=getattr(torch, dtype)).transpose(1, 2).requires_grad_() for shape in shapes]
    output = attention_triton(*states, None, 0.1, settings)
    torch.autograd.grad(output, states, torch.zeros_like(output))
    query, key, value = (tensor.detach() for tensor in states)
    attention_triton_decode(query[:, :, -1:], key, value, None, 0.1, settings)
    return dict(resources)


if __name__ == "__main__":
    print(json.dumps({shape: compile_all(*shape.split("-")) for shape in sys.argv[1:]}))
