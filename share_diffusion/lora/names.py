"""What layers are called: component, a dot, and the module path as diffusers spells it.

Example: `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0`,
`text_encoder.text_model.encoder.layers.3.self_attn.q_proj`. CLIP paths always carry `text_model.`: transformers 5.6
dropped it from the modules of CLIPTextModel, but every file and every other program still says it.
"""

from __future__ import annotations

import re

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

# Files of one component often leave its name out; then these first words of the path tell it. `text_projection` and
# T5's `encoder.block` are not among them: they occur in more than one text encoder, and a guess would be silent.
HOMES = (
    ("unet", re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)(\.|$)")),
    ("text_encoder", re.compile(r"(text_model|encoder\.layers)\.")),
    ("transformer", re.compile(r"(single_)?transformer_blocks\.")),
)

# The words of the UNets of SD 1.x, 2.x and SDXL, and of CLIP. Within one list, words joined by "_" come apart in only
# one way; across the two, `conv_out_proj` would not.
UNET_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers"),
    *("transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"),
    *("proj_in", "proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj"),
    *("time_embedding", "add_embedding", "linear_1", "linear_2"),
)
CLIP_WORDS = (
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("mlp", "fc1", "fc2", "text_projection"),
)
WORDS = {"unet": UNET_WORDS, "text_encoder": CLIP_WORDS, "text_encoder_2": CLIP_WORDS}


def underscored(module: str) -> str:
    """A module path as one word, `attn1.to_out.0` -> `attn1_to_out_0`."""
    return module.replace(".", "_")


def dotted(name: str, component: str) -> str | None:
    """The module path of a component behind one underscored word, or None where a word in it is unknown."""
    # Longest words first, so that `conv_in` is not taken for `conv`.
    words = "|".join(sorted(WORDS.get(component, ()), key=len, reverse=True))
    found = re.findall(rf"(?:{words}|[0-9]+)(?=_|$)", name)
    return ".".join(found) if found and "_".join(found) == name else None


def canonical(path: str) -> str | None:
    """A path in any of its dotted spellings as a layer name, or None where its component cannot be told."""
    component, _, module = path.removeprefix("base_model.model.").partition(".")
    if component not in COMPONENTS:
        module = path.removeprefix("base_model.model.")
        component = next((home for home, start in HOMES if start.match(module)), "")
    module = current(module.removeprefix("base_model.model."))
    if component.startswith("text_encoder") and module.startswith("encoder.layers."):
        module = f"text_model.{module}"
    return f"{component}.{module}" if component and module else None


def current(module: str) -> str:
    """A module path without the attention processors of diffusers before PEFT, `processor.to_out` -> `to_out.0`."""
    module = module.replace(".processor.", ".")
    module = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", module)
    return re.sub(r"\.to_out$", ".to_out.0", module)
