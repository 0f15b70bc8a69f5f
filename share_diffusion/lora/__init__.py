"""A LoRA in memory, read from and written to the dialects that other programs speak.

Whatever a file calls its matrices, here every layer is `Factors(up, down)` with dW = up @ down and nothing left to
multiply. `dialects.py` lists the dialects, one module each: its `read_<dialect>` is pure and either explains every
tensor or raises with the list of those that it cannot.
"""

from share_diffusion.lora.factors import Factors
from share_diffusion.lora.lora import LoRA

__all__ = ["Factors", "LoRA"]
