"""Exports at the true shapes of SD 1.5 and SDXL, with random weights: every key in its place, memory within bounds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_readers import stock_unet
from tiny_models import build_flux, build_sd3

from share_diffusion.export import export
from share_diffusion.export.checkpoint import checkpoint_entries
from share_diffusion.export.family import SD1, SD2, SDXL, family_of_pipeline
from share_diffusion.export.readers.keys import checkpoint_names
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Subspace

TEXT = {
    "SD 1.x": [{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}],
    "SD 2.x": [{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}],
}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXT["SDXL"] = [*TEXT["SD 1.x"], {**BIG_G, "projection_dim": 1280}]


def stock_pipeline(family):
    """A pipeline of a stock family's shapes without any numbers (meta tensors)."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    parts = {"unet": stock_unet(family), "scheduler": DDIMScheduler(), "tokenizer": None}
    with torch.device("meta"):
        parts["vae"] = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        texts = [CLIPTextConfig(**sizes) for sizes in TEXT[family.name]]
        parts["text_encoder"] = CLIPTextModel(texts[0])
        if family is SDXL:
            parts |= {"text_encoder_2": CLIPTextModelWithProjection(texts[1]), "tokenizer_2": None}
            return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.name)
def test_a_checkpoint_has_every_key_that_programs_need(family):
    pipeline = stock_pipeline(family)
    assert family_of_pipeline(pipeline) is family
    entries = checkpoint_entries(pipeline, family, torch.float16)
    extra = {key for key in entries if not key.endswith("logit_scale")} - checkpoint_names(family)
    assert (extra, checkpoint_names(family) - set(entries)) == (set(), set())
    first = "model.diffusion_model.input_blocks.0.0.weight"
    assert entries[first].shape == (320, 4, 3, 3)
    # Their parameters at two bytes each; the published files weigh the same to a percent.
    size = sum(one.bytes for one in entries.values())
    assert size == pytest.approx({"SD 1.x": 2.13e9, "SD 2.x": 2.607e9, "SDXL": 6.94e9}[family.name], rel=0.01)


@pytest.mark.slow
def test_an_sdxl_lora_is_read_by_every_program(tmp_path):
    generator, layers = torch.Generator().manual_seed(0), {}
    for path, module in select(stock_pipeline(SDXL)).items():
        out, width = shape_of(module)[0]
        up, down = torch.randn(out, 4, generator=generator), torch.randn(4, width, generator=generator)
        layers[path] = Factors(up / out**0.5, down / width**0.5)
    done = export(Subspace().merge({"ink": LoRA(layers)}), "ink:0.7", tmp_path / "ink.safetensors")
    assert len(layers) == 732  # 736 in all; the first text encoder's last block is never read
    assert all(verdict.matched == verdict.present == 3 * 732 for verdict in done.verdicts)
    assert json.loads((tmp_path / "ink.json").read_text())["sd version"] == "SDXL"


SCRIPT = """
import resource, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_export_sizes import stock_pipeline
from share_diffusion.export import export
from share_diffusion.export.family import SD1
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Subspace

pipeline, pattern = stock_pipeline(SD1), torch.randn(999983, dtype=torch.float32).half() / 50
for name in ("unet", "vae", "text_encoder"):
    part = getattr(pipeline, name).half().to_empty(device="cpu")
    for tensor in part.state_dict().values():
        if tensor.is_floating_point():
            tensor.view(-1).copy_(pattern.repeat(tensor.numel() // len(pattern) + 1)[: tensor.numel()])
layers = {}
for path, module in select(pipeline).items():
    out, width = shape_of(module)[0]
    layers[path] = Factors(torch.randn(out, 4) / out**0.5, torch.randn(4, width) / width**0.5)
subspace = Subspace().merge({"ink": LoRA(layers)})
before = pipeline.unet.conv_in.weight.clone()
done = export(subspace, "ink:0.5", sys.argv[2], "checkpoint", pipeline=pipeline, preview=False)
assert all(verdict.matched == verdict.present for verdict in done.verdicts), done.lines()
from safetensors import safe_open
layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
update = 0.5 * subspace.lora("ink").layers[layer].dense()
weight = pipeline.unet.get_submodule(layer[5:]).weight
with safe_open(sys.argv[2], "pt") as file:
    found = file.get_tensor("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight")
    assert torch.equal(file.get_tensor("model.diffusion_model.input_blocks.0.0.weight"), before)
assert (found.float() - (weight.float() + update)).abs().max() < 1e-3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_sd15_is_fused_and_written_in_little_memory(tmp_path):
    words = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "sd15.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The pipeline itself is 2 GiB in half precision; reading the libraries takes most of one more.
    assert float(done.stdout.split()[-1]) < 6
    (tmp_path / "sd15.safetensors").unlink()


def test_variants_of_one_family_have_their_own_names():
    named = [
        family_of_pipeline(one).modelspec
        for one in (build_sd3(), build_sd3(medium_3_5=True), build_flux(), build_flux(guidance=False))
    ]
    assert named == ["stable-diffusion-3-medium", "stable-diffusion-3-5-medium", "flux-1-dev", "flux-1-schnell"]
