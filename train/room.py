"""What to give less of where the memory of a device ends."""

from __future__ import annotations

from flags import ConceptSettings


def less(settings: ConceptSettings) -> str:
    """Return what would need less memory than these settings, what costs nothing but time first."""
    batch, accumulated = settings.train_batch_size, settings.gradient_accumulation_steps
    ways = []
    if batch > 1:
        part = next(part for part in range(batch // 2, 0, -1) if batch % part == 0)
        more = f"--gradient_accumulation_steps {accumulated * batch // part}"
        ways.append(f"--train_batch_size {part} {more} (as many pictures a step)")
    if not settings.low_vram:
        ways += [] if settings.gradient_checkpointing else ["--gradient_checkpointing"]
        ways.append("--low_vram")
    if settings.mixed_precision == "no" and not settings.cpu:
        ways.append("--mixed_precision bf16")
    if settings.quantize_base is None and not settings.cpu:
        ways.append("--quantize_base int8")
    ways.append(f"a --resolution below {settings.resolution}" if settings.resolution else "a smaller --resolution")
    return f"give {', or '.join(ways)}; configs/presets/ has settings for GPUs of 8 to 48 GB"
