"""Keys taken apart as all programs do it: a stem that names a layer, and an ending that names a matrix."""

from __future__ import annotations

from functools import cache

from share_diffusion.export.family import Family
from share_diffusion.export.original.unet import original_unet
from share_diffusion.export.original.vae import original_vae
from share_diffusion.export.stock import STOCK, text_components, text_modules, unet_modules, unet_parameters, vae_parameters

KOHYA_ENDINGS = (".lora_up.weight", ".lora_down.weight", ".alpha")
PEFT_ENDINGS = (".lora_A.weight", ".lora_B.weight")
PROCESSOR_ENDINGS = ("_lora.up.weight", "_lora.down.weight")
DOTTED_ENDINGS = (
    *(".lora.up.weight", ".lora.down.weight"),
    *(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
)
ENDINGS = (*KOHYA_ENDINGS, *PEFT_ENDINGS, *DOTTED_ENDINGS, *PROCESSOR_ENDINGS)


def apart(key: str) -> tuple[str, str]:
    """Return a key's stem and ending; the ending is empty where it is none of a LoRA's."""
    ending = next((ending for ending in ENDINGS if key.endswith(ending)), "")
    return key.removesuffix(ending), ending


def is_stock(family: Family) -> bool:
    """Return whether the layers of this family's models are known one by one."""
    return family.name in STOCK


# How the layers of transformers begin in kohya's dialect, which has the original programs' names there.
ORIGINAL_STARTS = {
    "FLUX.1": ("lora_unet_double_blocks_", "lora_unet_single_blocks_"),
    "SD 3": ("lora_unet_joint_blocks_",),
}


def foreign(family: Family) -> str:
    """Return the reason for a base that is none of the stock ones."""
    return f"{family.name}: no model of these shapes opens in it"


@cache
def kohya_unet(family: Family) -> dict[str, str]:
    """Return the UNet's layers by their kohya names, in diffusers' spelling and in the original one."""
    modules = unet_modules(family)
    named = {f"lora_unet_{module.replace('.', '_')}": module for module in modules}
    return named | {f"lora_unet_{old.replace('.', '_')}": module for module, old in original_unet(modules).items()}


@cache
def kohya_text(family: Family, prefixes: tuple[str, ...]) -> frozenset[str]:
    """Return the kohya names of the text encoders' layers; one prefix (or two joined by `|`) for each encoder."""
    return frozenset(
        f"{one}{module.replace('.', '_')}"
        for prefix, layers in zip(prefixes, text_components(family).values(), strict=False)
        for one in prefix.split("|")
        for module in text_modules(layers)
    )


@cache
def processor_names(family: Family) -> frozenset[str]:
    """Return the UNet's layers as attention processors spell them, with and without `unet.`."""
    names = {module.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out") for module in unet_modules(family)}
    return frozenset(names | {f"unet.{name}" for name in names})


@cache
def dotted_text(family: Family) -> frozenset[str]:
    """Return the text encoders' layers by their paths."""
    return frozenset(
        f"{component}.{module}" for component, layers in text_components(family).items() for module in text_modules(layers)
    )


@cache
def checkpoint_names(family: Family) -> frozenset[str]:
    """Return every tensor of a single-file checkpoint of a stock family that a program needs."""
    unet, vae = original_unet(unet_parameters(family)), original_vae(vae_parameters())
    found = {f"model.diffusion_model.{name}" for name in unet.values()}
    found |= {f"first_stage_model.{name}" for name in vae.values()}
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    if family.name == "SD 1.x":
        return frozenset(found | {f"cond_stage_model.transformer.{name}" for name in clip_parameters(12)})
    if family.name == "SD 2.x":
        return frozenset(found | {f"cond_stage_model.model.{name}" for name in open_clip_parameters(24)})
    found |= {f"{first}{name}" for name in clip_parameters(12)}
    return frozenset(found | {f"{second}{name}" for name in open_clip_parameters(32)})


def clip_parameters(layers: int) -> set[str]:
    """Return the parameters of a CLIP text encoder in transformers' spelling."""
    paths = set(text_modules(layers)) | {"text_model.final_layer_norm"}
    paths |= {f"text_model.encoder.layers.{number}.layer_norm{side}" for number in range(layers) for side in (1, 2)}
    found = {f"{path}.{end}" for path in paths for end in ("weight", "bias")}
    return found | {f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")}


def open_clip_parameters(layers: int) -> set[str]:
    """Return the parameters of a CLIP text encoder in OpenCLIP's spelling."""
    parts = ("ln_1.{}", "ln_2.{}", "mlp.c_fc.{}", "mlp.c_proj.{}", "attn.out_proj.{}", "attn.in_proj_{}")
    found = {
        f"transformer.resblocks.{number}.{part.format(end)}"
        for number in range(layers)
        for part in parts
        for end in ("weight", "bias")
    }
    return found | {"token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection"}


def checkpoint_reason(key: str, family: Family) -> str | None:
    """Return why no program takes a tensor of a single-file checkpoint, or None."""
    if not is_stock(family):
        return foreign(family)
    extra = ("v_pred", "ztsnr")
    known = key in checkpoint_names(family) or key in extra or key.endswith(("logit_scale", "position_ids"))
    return None if known else "no tensor of this name in the original layout"
