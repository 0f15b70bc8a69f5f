"""A trainer from elsewhere: an ordinary LoRA made with diffusers and peft alone, from its own seed.

It shares nothing with this library's training (no basis, no gradient directions, no code), so that what it writes is
what people have: `pytorch_lora_weights.safetensors` as `save_lora_weights` spells it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def train_foreign(
    pipeline: Any,
    pictures: Path,
    output: Path,
    seed: int,
    *,
    rank: int = 8,
    steps: int = 100,
    batch: int = 8,
    rate: float = 3e-3,
    timed: Callable[[float], None] = lambda seconds: None,
) -> Path:
    """Train a LoRA on a folder of pictures and captions, on copies of the pipeline's models, and return its file.

    `timed` is told how long every step took.
    """
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(seed)
    latents, tokens = encode(pipeline, pictures)
    models = {name: copy.deepcopy(getattr(pipeline, name)) for name in TARGETS}
    for name, model in models.items():
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS[name]))
    trained = [parameter for model in models.values() for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scheduler = pipeline.scheduler
    for _ in range(steps):
        started = time.perf_counter()
        chosen = torch.randint(len(latents), (batch,))
        times = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        noise = torch.randn(batch, *latents.shape[1:])
        noisy = scheduler.add_noise(latents[chosen], noise, times)
        velocity = scheduler.config.prediction_type == "v_prediction"
        wanted = scheduler.get_velocity(latents[chosen], noise, times) if velocity else noise
        states = models["text_encoder"](tokens[chosen])[0]
        loss = F.mse_loss(models["unet"](noisy, times, encoder_hidden_states=states).sample, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        timed(time.perf_counter() - started)
    weights = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in models.items()}
    StableDiffusionPipeline.save_lora_weights(str(output), **weights)
    return output / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def encode(pipeline: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the latents (n, c, h, w) and token ids of a folder of `metadata.jsonl` or of pictures with text files."""
    captions = {}
    if (folder / "metadata.jsonl").is_file():
        rows = map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        captions = {folder / row["file_name"]: row["text"] for row in rows}
    else:
        captions = {path: path.with_suffix(".txt").read_text(encoding="utf-8") for path in sorted(folder.glob("*.png"))}
    pixels = [
        torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8).float() / 127.5 - 1
        for path in captions
    ]
    side = Image.open(next(iter(captions))).height
    batch = torch.stack([entry.view(side, -1, 3).permute(2, 0, 1) for entry in pixels])
    latents = pipeline.vae.encode(batch).latent_dist.mean
    shift = getattr(pipeline.vae.config, "shift_factor", None) or 0.0
    tokens = pipeline.tokenizer(
        list(captions.values()), padding="max_length", truncation=True, max_length=pipeline.tokenizer.model_max_length
    )
    return (latents - shift) * pipeline.vae.config.scaling_factor, torch.tensor(tokens.input_ids)
