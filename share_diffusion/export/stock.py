"""Every parameter of the models that people have: SD 1.x, SD 2.x and SDXL, by the names of diffusers and transformers.

Other programs match keys against these fixed models, so their lists can be written down without loading one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from share_diffusion.export.family import Family


@dataclass(frozen=True)
class Stock:
    """The shape of a stock model: transformer blocks per UNet level, and in its middle; layers of each text encoder."""

    depths: tuple[int, ...]
    middle: int
    text: tuple[int, ...]
    # The UNet's inner layers beside the time that a picture's size goes into.
    added: bool = False


STOCK = {
    "SD 1.x": Stock((1, 1, 1, 0), 1, (12,)),
    "SD 2.x": Stock((1, 1, 1, 0), 1, (23,)),
    "SDXL": Stock((0, 2, 10), 10, (12, 32), added=True),
}
LAYERS = 2
# Levels whose first residual block changes the width, and so has a shortcut convolution.
WIDENING = (1, 2)
BOTH = ("weight", "bias")


@cache
def unet_parameters(family: Family) -> frozenset[str]:
    """Return the UNet's parameters, `down_blocks.0.resnets.0.conv1.weight` and so on."""
    stock = STOCK[family.name]
    last = len(stock.depths) - 1
    found = {f"{name}.{end}" for name in ("conv_in", "conv_norm_out", "conv_out") for end in BOTH}
    for embedding in ("time_embedding", *(["add_embedding"] * stock.added)):
        found |= {f"{embedding}.linear_{number}.{end}" for number in (1, 2) for end in BOTH}
    for level, depth in enumerate(stock.depths):
        found |= set(block(f"down_blocks.{level}", LAYERS, depth, (0,) if level in WIDENING else ()))
        found |= set(block(f"up_blocks.{last - level}", LAYERS + 1, depth, range(LAYERS + 1)))
        if level < last:
            found |= {f"down_blocks.{level}.downsamplers.0.conv.{end}" for end in BOTH}
            found |= {f"up_blocks.{level}.upsamplers.0.conv.{end}" for end in BOTH}
    found |= set(block("mid_block", 2, 0, ())) | set(attention("mid_block.attentions.0", stock.middle))
    return frozenset(found)


def block(path: str, layers: int, depth: int, shortcuts: tuple[int, ...] | range) -> Iterator[str]:
    """Yield the parameters of one level: its residual blocks, and their attention where it is deep enough to have any."""
    for number in range(layers):
        parts = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2", *["conv_shortcut"] * (number in shortcuts)]
        yield from (f"{path}.resnets.{number}.{part}.{end}" for part in parts for end in BOTH)
        if depth:
            yield from attention(f"{path}.attentions.{number}", depth)


def attention(path: str, depth: int) -> Iterator[str]:
    """Yield the parameters of one attention of so many transformer blocks."""
    yield from (f"{path}.{part}.{end}" for part in ("norm", "proj_in", "proj_out") for end in BOTH)
    for number in range(depth):
        inside = f"{path}.transformer_blocks.{number}"
        for part in ("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            yield from (f"{inside}.{part}.{end}" for end in BOTH)
        yield from (f"{inside}.{attn}.to_{side}.weight" for attn in ("attn1", "attn2") for side in "qkv")


@cache
def vae_parameters() -> frozenset[str]:
    """Return the parameters of the VAE that all three families share the shape of."""
    found = {f"{name}.{end}" for name in ("quant_conv", "post_quant_conv") for end in BOTH}
    for half, word, layers, shortcuts in (("encoder", "down", 2, WIDENING), ("decoder", "up", 3, (2, 3))):
        found |= {f"{half}.{name}.{end}" for name in ("conv_in", "conv_norm_out", "conv_out") for end in BOTH}
        places = [f"{half}.mid_block.resnets.{number}" for number in (0, 1)]
        places += [f"{half}.{word}_blocks.{level}.resnets.{number}" for level in range(4) for number in range(layers)]
        found |= {f"{place}.{part}.{end}" for place in places for part in ("norm1", "conv1", "norm2", "conv2") for end in BOTH}
        found |= {f"{half}.{word}_blocks.{level}.resnets.0.conv_shortcut.{end}" for level in shortcuts for end in BOTH}
        found |= {f"{half}.{word}_blocks.{level}.{word}samplers.0.conv.{end}" for level in range(3) for end in BOTH}
        parts = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
        found |= {f"{half}.mid_block.attentions.0.{part}.{end}" for part in parts for end in BOTH}
    return frozenset(found)


def text_components(family: Family) -> dict[str, int]:
    """Return how many layers each text encoder has, by its component."""
    return dict(zip(("text_encoder", "text_encoder_2"), STOCK[family.name].text, strict=False))


@cache
def text_modules(layers: int) -> frozenset[str]:
    """Return the linear layers of a CLIP text encoder."""
    parts = [f"self_attn.{side}_proj" for side in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    return frozenset(f"text_model.encoder.layers.{number}.{part}" for number in range(layers) for part in parts)


@cache
def unet_modules(family: Family) -> frozenset[str]:
    """Return the linear layers and convolutions of the UNet, which is what a LoRA can adapt."""
    paths = {name.rpartition(".")[0] for name in unet_parameters(family) if name.endswith(".weight")}
    return frozenset(path for path in paths if "norm" not in path.rpartition(".")[2])
