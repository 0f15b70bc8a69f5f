"""What other programs match of a file, one file per program: their key maps, written down anew and replayed.

Each module has NAME, `lora(key, family)`, `checkpoint(key, family)` and `folder(name)`: None where the program takes the
key (or the file of a pipeline folder), else the reason why it does not. An unmatched key is seldom an error in these
programs, only a line in a log; that is why they are counted here.
"""

from __future__ import annotations

from share_diffusion.export.readers import a1111, comfyui, diffusers, invokeai, sd_scripts

READERS = (comfyui, a1111, invokeai, sd_scripts, diffusers)
