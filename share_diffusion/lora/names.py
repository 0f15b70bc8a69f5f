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
UNET_STARTS = (
    *("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"),
    *("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"),
)
TRANSFORMER_STARTS = (
    *("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "time_text_embed"),
    *("pos_embed", "norm_out", "proj_out", "double_blocks", "single_blocks", "joint_blocks", "final_layer"),
    *("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "t_embedder", "y_embedder"),
)
HOMES = (
    ("unet", re.compile(rf"({'|'.join(UNET_STARTS)})(\.|$)")),
    ("text_encoder", re.compile(r"(text_model|encoder\.layers)\.")),
    ("transformer", re.compile(rf"({'|'.join(TRANSFORMER_STARTS)})(\.|$)")),
)
# What programs put before the path of a denoiser.
PREFIXES = re.compile(r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.)+")

# Words of module paths, one vocabulary a naming: diffusers' UNets, the same in the original (ldm, sgm) spelling, CLIP,
# T5, diffusers' transformers, and those in the spelling of FLUX and of SD3. A word may hold dots. Within one
# vocabulary, words joined by "_" come apart in only one way; across two, `conv_out_proj` would not.
VOCABULARIES = {
    "unet": (
        *("down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers"),
        *("transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"),
        *("proj_in", "proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj"),
        *("time_embedding", "add_embedding", "linear_1", "linear_2"),
    ),
    "ldm": (
        *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection"),
        *("transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"),
        *("proj_in", "proj_out", "conv", "op", "time_embed", "label_emb"),
    ),
    "clip": (
        *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        *("mlp", "fc1", "fc2", "text_projection"),
    ),
    "t5": ("encoder", "block", "layer", "SelfAttention", "DenseReluDense", "q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "transformer": (
        *("transformer_blocks", "single_transformer_blocks", "attn", "attn2", "to_q", "to_k", "to_v", "to_out"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff", "ff_context", "net", "proj", "proj_mlp", "proj_out"),
        *("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "linear_1", "linear_2"),
        *("x_embedder", "context_embedder", "pos_embed", "time_text_embed"),
        *("timestep_embedder", "text_embedder", "guidance_embedder"),
    ),
    "flux": (
        *("double_blocks", "single_blocks", "img_attn", "txt_attn", "qkv", "proj", "img_mlp", "txt_mlp", "img_mod", "txt_mod"),
        *("lin", "linear1", "linear2", "modulation", "img_in", "txt_in", "time_in", "vector_in", "guidance_in"),
        *("in_layer", "out_layer", "final_layer", "linear", "adaLN_modulation"),
    ),
    "sd3": (
        *("joint_blocks", "x_block", "context_block", "attn", "attn2", "qkv", "proj", "mlp", "fc1", "fc2"),
        *("adaLN_modulation", "final_layer", "linear", "x_embedder", "context_embedder", "t_embedder", "y_embedder"),
    ),
}
WORDS = {
    "unet": ("unet", "ldm"),
    "transformer": ("transformer", "flux", "sd3"),
    "text_encoder": ("clip",),
    "text_encoder_2": ("clip", "t5"),
    "text_encoder_3": ("t5",),
}


def underscored(module: str) -> str:
    """A module path as one word, `attn1.to_out.0` -> `attn1_to_out_0`."""
    return module.replace(".", "_")


def apart(name: str, vocabulary: str) -> str | None:
    """The dotted path behind one underscored word, or None where a part of it is not in the vocabulary."""
    words, parts = {underscored(word): word for word in VOCABULARIES[vocabulary]}, name.split("_")
    longest = max(word.count("_") for word in words) + 1
    steps: dict[int, tuple[str, int]] = {len(parts): ("", 0)}  # from a part: the word there, and where the next one starts
    for start in reversed(range(len(parts))):
        for end in reversed(range(start + 1, min(start + longest, len(parts)) + 1)):
            piece = "_".join(parts[start:end])
            word = piece if re.fullmatch(r"[0-9]+", piece) else words.get(piece)
            if word is not None and end in steps:  # the longest word first, so that `conv_in` is not taken for `conv`
                steps[start] = word, end
                break
    path, place = [], 0 if 0 in steps else len(parts)
    while place < len(parts):
        word, place = steps[place]
        path.append(word)
    return ".".join(path) or None


def dotted(name: str, component: str) -> str | None:
    """The module path of a component behind one underscored word, in the first naming that knows all its parts."""
    paths = (apart(name, vocabulary) for vocabulary in WORDS.get(component, ()))
    return next((path for path in paths if path), None)


def home(path: str) -> str:
    """The component that a module path tells by its first words, or nothing."""
    return next((component for component, start in HOMES if start.match(path)), "")


def canonical(path: str, folder: str = "") -> str | None:
    """A path in any of its dotted spellings as a layer name, or None where its component cannot be told.

    `folder` is the component that the file's place tells; it counts where the path names none and does not speak against it.
    """
    path = PREFIXES.sub("", path)
    component, _, module = path.partition(".")
    if component not in COMPONENTS:
        component, module = home(path), path
        component = folder if folder.startswith(component) and folder in COMPONENTS else component
    module = current(PREFIXES.sub("", module))
    if component.startswith("text_encoder") and module.startswith("encoder.layers."):
        module = f"text_model.{module}"
    return f"{component}.{module}" if component and module else None


def current(module: str) -> str:
    """A module path without the attention processors of diffusers before PEFT, `processor.to_out` -> `to_out.0`."""
    module = module.replace(".processor.", ".")
    module = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", module)
    return re.sub(r"\.to_out$", ".to_out.0", module)
