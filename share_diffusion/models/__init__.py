"""What differs between base models: one file per family behind one small contract, `family.Family`.

    family = family_of(pipeline)             # ValueError with the known families where there is none
    inputs = tokenize(family, pipeline, captions) | family.framing(pipeline, originals, corners, size)
    latents = family.encode_pictures(pipeline, pictures)
    noisy = add_noise(pipeline, latents, noise, times)                 # objective.py
    predicted = family.predict(pipeline, noisy, times, {**inputs, **family.encode_text(pipeline, inputs)})

Nothing else in the library knows what a UNet is. To add a family:

1. Write `models/<family>.py` with the functions that `Family` lists (shapes are told there) and one value `FAMILY`. The
   four present ones have 90 to 150 lines. Shared pieces: `texts` (tokenisers), `latents` (autoencoders), `noise`
   (diffusion and flow matching, from the scheduler's config), `targets` (names of attention layers).
2. `owns` looks at the pipeline's parts, never at a name; it must be false for every other family.
3. `encode_text` must equal the pipeline's own `encode_prompt`, and let gradients through.
4. Latents are always (n, channels, height, width) outside; a denoiser that wants them packed packs them in `predict`.
5. Put it into `FAMILIES` below, and a small random pipeline of it into `tests/tiny_models.py`: every test of
   `tests/test_families.py` then runs on it too. A single-file checkpoint is recognised by a key in `single_file.py`.
"""

from __future__ import annotations

from typing import Any

from share_diffusion.models import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from share_diffusion.models.family import Family

FAMILIES = (stable_diffusion.FAMILY, stable_diffusion_xl.FAMILY, stable_diffusion_3.FAMILY, flux.FAMILY)


def family_of(pipeline: Any) -> Family:
    """Return the pipeline's family, or raise ValueError with the known ones."""
    for family in FAMILIES:
        if family.owns(pipeline):
            return family
    known = ", ".join(family.title for family in FAMILIES)
    raise ValueError(f"{type(pipeline).__name__} is of no known family of base models; known are {known}")
