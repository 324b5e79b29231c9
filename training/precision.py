"""Which arithmetic a recipe's `precision` comes to on the machine that trains."""

from __future__ import annotations

from functools import cache

import torch

# As torch.cpu.get_capabilities() names them, on x86 and on ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")


@cache
def processor_has_bf16() -> bool:
    """Whether this processor multiplies 16-bit bfloats. torch emulates them where it does not, and a step of
    training takes twenty times as long as in 32 bits (measured on AVX2: 40 s for 2.6 s)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BF16_INSTRUCTIONS)


def computed_in(precision: str, device: str) -> str:
    """`precision` of a schedule, or "no" (32 bits) where `device` ("cpu", "cuda") only emulates it."""
    return "no" if precision == "bf16" and device == "cpu" and not processor_has_bf16() else precision
