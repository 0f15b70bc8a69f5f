"""Facts about the key maps: they name every layer of diffusers' own models, and agree with the programs themselves.

ComfyUI and sd-scripts are asked where COMFYUI_DIR and SDSCRIPTS_DIR name a copy and their requirements are installed
(in the environments of COMFYUI_PYTHON and SDSCRIPTS_PYTHON, where those are others).
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from share_diffusion.export.family import OTHER, SD1, SD2, SDXL, family_of
from share_diffusion.export.original.unet import original_unet
from share_diffusion.export.original.vae import original_vae
from share_diffusion.export.readers import READERS, a1111, comfyui, diffusers, invokeai, sd_scripts
from share_diffusion.export.readers.keys import checkpoint_names
from share_diffusion.export.stock import text_components, text_modules, unet_modules, unet_parameters, vae_parameters
from share_diffusion.export.verify import verify
from share_diffusion.lora import Factors, LoRA
from share_diffusion.lora.processor import processor_stem

STOCK = (SD1, SD2, SDXL)
UNETS = {
    "SD 1.x": {"cross_attention_dim": 768},
    "SD 2.x": {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)},
    "SDXL": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def stock_unet(family):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[family.name])


@pytest.mark.parametrize("family", STOCK, ids=lambda family: family.name)
def test_the_lists_are_those_of_diffusers_own_models(family):
    unet = stock_unet(family)
    assert set(unet.state_dict()) == unet_parameters(family)
    layers = {name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert layers == unet_modules(family)


def test_the_list_of_the_vae_is_diffusers_own():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    assert set(vae.state_dict()) == vae_parameters()


@pytest.mark.parametrize("family", STOCK, ids=lambda family: family.name)
def test_no_two_parameters_share_a_name_in_the_original(family):
    for names, table in ((unet_parameters(family), original_unet), (vae_parameters(), original_vae)):
        renamed = table(names)
        assert len(set(renamed.values())) == len(names)
    # The counts of the published files, without position_ids and the schedule's tables.
    assert len(checkpoint_names(family)) == {"SD 1.x": 1130, "SD 2.x": 1227, "SDXL": 2513}[family.name]


def test_well_known_names_of_the_original():
    names = original_unet(unet_parameters(SD1))
    assert names["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    )
    assert names["up_blocks.1.upsamplers.0.conv.bias"] == "output_blocks.5.2.conv.bias"
    assert names["up_blocks.0.upsamplers.0.conv.bias"] == "output_blocks.2.1.conv.bias"
    assert names["mid_block.resnets.1.time_emb_proj.weight"] == "middle_block.2.emb_layers.1.weight"
    assert names["down_blocks.2.downsamplers.0.conv.weight"] == "input_blocks.9.0.op.weight"


def spellings(family):
    """Every layer of a family's models in every spelling that is met."""
    renamed = original_unet(unet_modules(family))
    found = []
    for module, old in renamed.items():
        found += [f"lora_unet_{name.replace('.', '_')}.lora_up.weight" for name in (module, old)]
        found += [f"unet.{module}.lora_B.weight", f"{processor_stem(f'unet.{module}')}.up.weight"]
    for component, layers in text_components(family).items():
        for module in text_modules(layers):
            found += [f"lora_te{n}_{module.replace('.', '_')}.lora_up.weight" for n in ("", 1, 2)]
            found += [f"{component}.{module}.lora_B.weight", f"{component}.{module}.lora_linear_layer.up.weight"]
            found.append(f"{component}.{module.removeprefix('text_model.')}.lora_B.weight")
    return found


def attention(family):
    return [module for module in unet_modules(family) if ".attn" in module]


@pytest.mark.parametrize("family", STOCK, ids=lambda family: family.name)
def test_every_program_reads_all_of_kohyas_names(family):
    prefixes = ("lora_te1_", "lora_te2_") if family is SDXL else ("lora_te_",)
    keys = [f"lora_unet_{module.replace('.', '_')}" for module in attention(family)]
    for prefix, layers in zip(prefixes, text_components(family).values(), strict=True):
        keys += [f"{prefix}{module.replace('.', '_')}" for module in text_modules(layers)]
    for reader in READERS:
        assert [key for key in keys if reader.lora(f"{key}.alpha", family)] == [], reader.NAME


def test_what_the_programs_are_known_to_pass_over():
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    text = "text_model_encoder_layers_0_self_attn_q_proj"
    assert "export --format kohya" in comfyui.lora(f"unet.{layer}.lora_A.weight", SD1)
    assert comfyui.lora(f"{processor_stem(f'unet.{layer}')}.down.weight", SD1) is None
    assert comfyui.lora(f"lora_te1_{text}.alpha", SD1) is None
    assert "ignored" in sd_scripts.lora(f"lora_te1_{text}.alpha", SD1)
    assert sd_scripts.lora(f"lora_te1_{text}.alpha", SDXL) is None
    assert sd_scripts.lora("lora_unet_conv_in.alpha", SD1)
    for reader in (a1111, invokeai, sd_scripts):
        assert reader.lora(f"unet.{layer}.lora_A.weight", SD1)
    assert diffusers.lora(f"unet.{layer}.lora_A.weight", OTHER) is None


def test_families_by_shape():
    query, key = "unet.x.attn2.to_q", "unet.x.attn2.to_k"
    assert [family_of({query: (320, 320), key: (320, width)}) for width in (768, 1024, 2048)] == [SD1, SD2, SDXL]
    assert family_of({query: (64, 64), key: (64, 768)}) is OTHER
    assert family_of({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (5120, 1280)}) is SDXL


def test_a_lora_that_does_nothing_is_told(tmp_path):
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = LoRA({layer: Factors(torch.randn(640, 2), torch.randn(2, 768))})
    lora.write(tmp_path / "x.safetensors", "diffusers")
    verdicts = {verdict.program: verdict for verdict in verify(tmp_path / "x.safetensors")}
    assert (verdicts["ComfyUI"].matched, verdicts["ComfyUI"].present) == (0, 2)
    assert "2 passed over: PEFT's names" in str(verdicts["ComfyUI"])
    assert verdicts["diffusers"].matched == 2


def test_matrices_of_one_dimension_are_no_matrices(tmp_path):
    attn = "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2"
    pair = {f"lora_{attn}_to_k.lora_down.weight": torch.ones(768), f"lora_{attn}_to_k.lora_up.weight": torch.ones(640, 1)}
    save_file({**pair, f"lora_{attn}_to_k.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    for verdict in verify(tmp_path / "lora.safetensors"):
        assert "1 passed over: no matrix, by its shape" in verdict.reasons
    names = ("input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", "input_blocks.0.0.weight")
    for shapes in ((768,), (320, 4, 3, 3)), ((640, 768), ()), ((), (320,)):
        tensors = {f"model.diffusion_model.{name}": torch.ones(shape) for name, shape in zip(names, shapes, strict=True)}
        save_file(tensors, tmp_path / "checkpoint.safetensors")
        assert all(verdict.matched == 0 for verdict in verify(tmp_path / "checkpoint.safetensors"))


def peft_folder(folder, config, convolution=False):
    """A PEFT folder of one component that adapts two layers."""
    folder.mkdir(parents=True, exist_ok=True)
    block = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    kernel = (1, 1) if convolution else ()
    tensors = {f"{block}.{side}.lora_A.weight": torch.ones(2, 8, *kernel) for side in ("to_q", "to_k")}
    tensors |= {f"{block}.{side}.lora_B.weight": torch.ones(8, 2, *kernel) for side in ("to_q", "to_k")}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "matched"),
    [
        ({"target_modules": ["to_q", "to_k"]}, 4),
        ({"target_modules": ["attn1.to_q"]}, 2),
        ({"target_modules": ["o_q", "down_blocks"]}, 0),
        ({"target_modules": "all-linear"}, 4),
        ({"target_modules": ["to_q", "to_k"], "exclude_modules": ["to_k"]}, 2),
        ({"target_modules": None}, 0),
        ({}, 0),
    ],
)
def test_peft_names_modules_by_their_end(tmp_path, config, matched):
    """As `check_target_module_exists` of peft itself decides."""
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import check_target_module_exists

    (verdict,) = verify(peft_folder(tmp_path / "unet", config))
    assert (verdict.file, verdict.program, verdict.matched, verdict.present) == ("unet", "PEFT", matched, 4)
    if isinstance(config.get("target_modules"), list):
        module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
        asked = SimpleNamespace(modules_to_save=None, layers_to_transform=None, **config)
        assert 2 * sum(bool(check_target_module_exists(asked, f"{module}.{side}")) for side in ("to_q", "to_k")) == matched


def test_all_linear_names_no_convolution(tmp_path):
    (verdict,) = verify(peft_folder(tmp_path, {"target_modules": "all-linear"}, convolution=True))
    assert verdict.matched == 0
    assert verdict.reasons == ("4 passed over: all-linear names no convolution",)


def test_a_pattern_is_left_to_peft(tmp_path):
    """A regular expression from a stranger may run for ever, so none is run."""
    peft_folder(tmp_path / "unet", {"target_modules": "(.*)*(.*)*(.*)*x"})
    peft_folder(tmp_path / "text_encoder", {"target_modules": ["to_q"], "layers_to_transform": [0]})
    peft_folder(tmp_path / "transformer", {"target_modules": ["to_q", "to_k"]})
    verdicts = {verdict.file: verdict for verdict in verify(tmp_path)}
    assert "only PEFT itself tells" in str(verdicts["unet"])
    assert "layers_to_transform" in str(verdicts["text_encoder"])
    assert verdicts["transformer"].matched == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[]", "is a JSON list; expected an object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"target_modules": 5}', "target_modules is 5"),
        ('{"target_modules": ["a", 5]}', "target_modules is ['a', 5]"),
        ('{"target_modules": ["a"], "exclude_modules": {"a": 1}}', "exclude_modules is {'a': 1}"),
    ],
)
def test_a_peft_config_that_is_none_is_named(tmp_path, config, words):
    folder = peft_folder(tmp_path / "unet", config)
    for place in (folder, tmp_path):
        with pytest.raises(ValueError) as caught:
            verify(place)
        assert f"{folder / 'adapter_config.json'}" in str(caught.value)
        assert words in str(caught.value)


def test_folders_of_a_folder_are_judged_one_by_one(tmp_path):
    (tmp_path / "ink").mkdir()
    (tmp_path / "ink" / "model_index.json").write_text("{}")
    (tmp_path / "ink" / "unet").mkdir()
    (tmp_path / "ink" / "unet" / "config.json").write_text('{"cross_attention_dim": Infinity, "block_out_channels": []}')
    (tmp_path / "owl.safetensors").write_bytes(b"")
    assert {verdict.file: verdict.program for verdict in verify(tmp_path)}.items() >= {"owl.safetensors": ""}.items()
    assert {verdict.file for verdict in verify(tmp_path) if verdict.program} == {"ink"}


COMFY = """
import json, sys
folder, question = sys.argv[1:]
sys.argv = ["comfyui", "--cpu"]
sys.path.insert(0, folder)
import comfy.options
comfy.options.enable_args_parsing()
import comfy.lora
from types import SimpleNamespace
asked = json.load(open(question))
config = SimpleNamespace(unet_config=asked["config"])
unet = SimpleNamespace(state_dict=lambda: dict.fromkeys(asked["unet"]), model_config=config)
text = SimpleNamespace(state_dict=lambda: dict.fromkeys(asked["text"]))
known = comfy.lora.model_lora_keys_clip(text, comfy.lora.model_lora_keys_unet(unet, {}))
print(json.dumps(sorted(key for key in known if isinstance(key, str))))
"""

CONFIGS = {
    "SDXL": {
        "num_res_blocks": [2] * 3,
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    }
}
PLAIN = {
    "num_res_blocks": [2] * 4,
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
}
ENCODERS = {"SD 1.x": ["clip_l"], "SD 2.x": ["clip_h"], "SDXL": ["clip_l", "clip_g"]}


@pytest.mark.parametrize("family", STOCK, ids=lambda family: family.name)
def test_comfyui_itself_knows_the_same_keys(family, tmp_path):
    if not (folder := os.environ.get("COMFYUI_DIR")):
        pytest.skip("no copy of ComfyUI at hand; set COMFYUI_DIR to ask it")
    from share_diffusion.export.readers.keys import apart, clip_parameters

    encoders = zip(ENCODERS[family.name], text_components(family).values(), strict=True)
    question = {
        "unet": [f"diffusion_model.{name}" for name in original_unet(unet_parameters(family)).values()],
        "config": CONFIGS.get(family.name, PLAIN),
        "text": [f"{name}.transformer.{key}" for name, layers in encoders for key in clip_parameters(layers)],
    }
    (tmp_path / "question.json").write_text(json.dumps(question))
    words = [os.environ.get("COMFYUI_PYTHON", sys.executable), "-c", COMFY, folder, str(tmp_path / "question.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"ComfyUI's requirements are not installed here: {done.stderr.strip().splitlines()[-1]}")
    known = set(json.loads(done.stdout.strip().splitlines()[-1]))
    asked = spellings(family)
    assert [key for key in asked if (apart(key)[0] in known) != (comfyui.lora(key, family) is None)] == []
    assert len(asked) > 1000


SDSCRIPTS = """
import json, sys
folder, question, answer = sys.argv[1:]
sys.path.insert(0, folder)
import torch
from networks import lora
from library.original_unet import UNet2DConditionModel
from library.sdxl_original_unet import SdxlUNet2DConditionModel
from safetensors.torch import load_file, save_file
asked = json.load(open(question))
with torch.device("meta"):
    unet = SdxlUNet2DConditionModel() if asked["unet"] is None else UNet2DConditionModel(**asked["unet"])
weights = load_file(asked["file"])
nothing = torch.nn.Module()
network, weights = lora.create_network_from_weights(0.5, None, None, nothing, unet, weights_sd=weights, for_inference=True)
unet_loras = {module.lora_name: module for module in network.unet_loras}
said = {}
for name, module in unet_loras.items():
    own = {key.split(".", 1)[1]: value for key, value in weights.items() if key.split(".")[0] == name}
    assert module.load_state_dict(own, strict=False).unexpected_keys == []  # the base's weights are absent
    update = module.get_weight().flatten(1).double()
    said[name] = update @ torch.linspace(-1, 1, update.shape[1], dtype=torch.float64)
save_file(said, answer)
"""
OLD_UNETS = {
    "SD 1.x": {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False},
    "SD 2.x": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
}


@pytest.mark.parametrize("family", STOCK, ids=lambda family: family.name)
def test_sd_scripts_itself_changes_the_same_layers_by_the_same_numbers(family, tmp_path):
    if not (folder := os.environ.get("SDSCRIPTS_DIR")):
        pytest.skip("no copy of kohya's sd-scripts at hand; set SDSCRIPTS_DIR to ask it")
    old, generator = OLD_UNETS.get(family.name), torch.Generator().manual_seed(1)
    layers = {}
    for path, module in stock_unet(family).named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            out, into, *kernel = module.weight.shape
            sides = torch.randn(out, 2, generator=generator), torch.randn(2, into * math.prod(kernel), generator=generator)
            layers[f"unet.{path}"] = Factors(*sides, tuple(kernel) or None)
    file = tmp_path / "lora.safetensors"
    LoRA(layers, {}).write(file, "kohya", dtype=torch.float32)
    question = {"unet": old and {**old, "sample_size": 64, "upcast_attention": False}, "file": str(file)}
    (tmp_path / "question.json").write_text(json.dumps(question))
    python = os.environ.get("SDSCRIPTS_PYTHON", sys.executable)
    words = [python, "-c", SDSCRIPTS, folder, str(tmp_path / "question.json"), str(tmp_path / "said.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"the requirements of sd-scripts are not installed here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-1500:]
    said = load_file(tmp_path / "said.safetensors")
    spelt = original_unet(unet_parameters(family)) if family is SDXL else {}  # sd-scripts has the original names there
    expected = {}
    for path, factors in layers.items():
        module = path.removeprefix("unet.")
        if sd_scripts.lora(f"lora_unet_{module.replace('.', '_')}.lora_down.weight", family) is None:
            name = spelt.get(f"{module}.weight", module).removesuffix(".weight")
            expected[f"lora_unet_{name.replace('.', '_')}"] = factors
    assert set(said) == set(expected)
    for name in expected:
        up, down = expected[name].up.double(), expected[name].down.double()
        update = 0.5 * up @ (down @ torch.linspace(-1, 1, down.shape[1], dtype=torch.float64))
        assert (said[name] - update).norm() < 1e-5 * update.norm(), name


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_transformers_lora_is_read_where_the_tables_say(name, tmp_path):
    """Kohya's dialect reaches ComfyUI and sd-scripts whole; of T5 diffusers keeps nothing, whatever the dialect."""
    import tiny_models
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

    from share_diffusion.models.layers import select, shape_of

    pipeline = getattr(tiny_models, f"build_{name}")()
    shapes = {path: shape_of(module)[0] for path, module in select(pipeline, "attention+ff").items()}
    # diffusers cuts the fused layer of a single block at FLUX's true widths, which this small model has not.
    shapes = {path: shape for path, shape in shapes.items() if ".single_" not in path or path.endswith("proj_out")}
    lora = LoRA({path: Factors(torch.randn(out, 2), torch.randn(2, into)) for path, (out, into) in shapes.items()})
    verdicts = {}
    for dialect in ("kohya", "diffusers"):
        lora.write(tmp_path / f"{dialect}.safetensors", dialect, dtype=torch.float32)
        for verdict in verify(tmp_path / f"{dialect}.safetensors"):
            verdicts[dialect, verdict.program] = (verdict.matched, verdict.present)
    t5 = "text_encoder_2." if name == "flux" else "text_encoder_3."
    of_t5 = sum(path.startswith(t5) for path in shapes)
    assert of_t5 > 0
    for program in ("ComfyUI", "sd-scripts"):
        matched, present = verdicts["kohya", program]
        assert matched == present > 0
    assert verdicts["diffusers", "diffusers"] == (2 * (len(shapes) - of_t5), 2 * len(shapes))
    kind = {"flux": FluxPipeline, "sd3": StableDiffusion3Pipeline}[name]
    if name == "flux":
        kept = kind.lora_state_dict(str(tmp_path / "kohya.safetensors"))
        assert len(kept) == 2 * (len(shapes) - of_t5)
        matched, present = verdicts["kohya", "diffusers"]
        assert present - matched == 3 * of_t5
    else:
        assert verdicts["kohya", "diffusers"][0] == 0
    kind.load_lora_weights(pipeline, str(tmp_path / "diffusers.safetensors"))
    parts = {
        part: getattr(pipeline, part, None) for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    }
    adapted = {
        part for part, module in parts.items() if module and any(path.endswith("lora_A") for path, _ in module.named_modules())
    }
    assert t5.rstrip(".") not in adapted
    assert {"transformer", "text_encoder"} <= adapted
