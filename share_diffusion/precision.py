"""bfloat16 on CPUs that compute it, float32 on those that only emulate it (a matrix product there takes 60 times as long)."""

from __future__ import annotations

import torch


def computes_bfloat16() -> bool:
    """Tell whether the CPU has instructions for products of bfloat16 matrices."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    asked = [getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    named = [capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16")]
    return any(named) or any(ask() for ask in asked)


def half_precision() -> torch.autocast:
    """Return the autocast region for a CPU's forward pass; it changes nothing where bfloat16 is emulated."""
    return torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16())
