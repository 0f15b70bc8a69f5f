"""Facts about the ComfyUI nodes: they read what the library writes, mix it to the same update, and import none of it.

The nodes themselves run inside a real ComfyUI where COMFYUI_DIR names one.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from share_diffusion.blend import Blend
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Subspace

PACK = Path(__file__).resolve().parents[1] / "app" / "comfyui"
COMFYUI = os.environ.get("COMFYUI_DIR")

# The package's own __init__ needs ComfyUI; its reading and mixing do not.
LOAD = f"""
import sys, types
pack = types.ModuleType("pack")
pack.__path__ = [{str(PACK)!r}]
sys.modules["pack"] = pack
from pack import mixing, reader
"""

MIX = (
    LOAD
    + """
import json
from safetensors.torch import save_file
file, text, output = sys.argv[1:]
held = reader.read(file)
save_file(mixing.mixed(held, mixing.parse(text)), output)
print(json.dumps({"base": held.base, "concepts": {one.name: [one.kind, one.trigger] for one in held.concepts.values()},
                  "foreign": [name for name in sys.modules if name.partition(".")[0] in ("share_diffusion", "diffusers")]}))
"""
)


def alone(code, *words):
    """Run code in a fresh Python that knows nothing of the library."""
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=PACK, env=environment
    )


def subspace(origin="adapters"):
    """Two concepts over linear layers, convolutions and text encoders; the second changes fewer layers."""
    shapes = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (24, 24, None),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (32, 32, None),
        "unet.down_blocks.0.resnets.0.conv1": (16, 8 * 9, (3, 3)),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (20, 20, None),
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc1": (40, 20, None),
    }
    generator = torch.Generator().manual_seed(3)

    def lora(paths, rank):
        return LoRA(
            {
                path: Factors(
                    torch.randn(shapes[path][0], rank, generator=generator),
                    torch.randn(rank, shapes[path][1], generator=generator) / math.sqrt(shapes[path][1]),
                    shapes[path][2],
                )
                for path in paths
            }
        )

    empty = Subspace() if origin == "adapters" else Subspace.fit({"zero": lora(list(shapes), 2)}, basis=origin, derived_rank=6)
    about = {"ink wash": {"trigger": "inkw"}, "owl": {"kind": "subject", "trigger": "owlie"}}
    return empty.merge({"ink wash": lora(list(shapes), 3), "owl": lora(list(shapes)[1:4], 2)}, about=about)


@pytest.mark.parametrize("origin", ["adapters", "random"])
@pytest.mark.parametrize("text", ["ink wash:0.8, owl:-0.4", "ink wash:0.8 + owl:-0.4", '"owl"', "ink wash:0, owl:1e-1"])
def test_a_mix_is_what_the_library_blends(tmp_path, origin, text):
    made = subspace(origin)
    made.save(tmp_path / "two.safetensors")
    done = alone(MIX, tmp_path / "two.safetensors", text, tmp_path / "mix.safetensors")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["foreign"] == []
    assert said["concepts"].items() >= {"ink wash": ["style", "inkw"], "owl": ["subject", "owlie"]}.items()
    held, weights = Subspace.load(tmp_path / "two.safetensors"), Blend.parse(text.replace(",", " +")).weights
    cores = held.blend(weights)
    tensors = load_file(tmp_path / "mix.safetensors")
    assert len(tensors) == 2 * len(cores)
    for layer, core in cores.items():
        component, _, module = layer.partition(".")
        name = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
        name += module.replace(".", "_")
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        assert down.ndim == (4 if layer in held.kernels else 2)
        expected = held.layers[layer].beta @ core @ held.layers[layer].alpha.mT
        assert (up.flatten(1) @ down.flatten(1) - expected).norm() <= 1e-6 * expected.norm()


def test_one_concept_is_the_librarys_lora_to_the_bit(tmp_path):
    made = subspace().save(tmp_path / "two.safetensors")
    assert alone(MIX, tmp_path / "two.safetensors", "owl", tmp_path / "mix.safetensors").returncode == 0
    tensors = load_file(tmp_path / "mix.safetensors")
    for layer, factors in Subspace.load(tmp_path / "two.safetensors").lora("owl").layers.items():
        (up,) = (value for key, value in tensors.items() if layer.replace(".", "_")[5:] in key and "up" in key)
        assert torch.equal(up.flatten(1), factors.up)
    assert made.generation == 1


@pytest.mark.parametrize("text", ["ink wash:x", "ink wash owl:", "owl:0.5, owl:1", "owl,", "nobody", "owl:nan", ": 3"])
def test_a_mix_that_makes_no_sense_is_one_message(tmp_path, text):
    subspace().save(tmp_path / "two.safetensors")
    done = alone(MIX, tmp_path / "two.safetensors", text, tmp_path / "mix.safetensors")
    assert done.stderr.strip().splitlines()[-1].startswith("ValueError: ")
    assert not (tmp_path / "mix.safetensors").exists()


def test_damaged_newer_and_foreign_files_are_refused(tmp_path):
    subspace().save(tmp_path / "two.safetensors")
    data = (tmp_path / "two.safetensors").read_bytes()
    LoRA({"unet.conv_in": Factors(torch.ones(2, 1), torch.ones(1, 2))}).write(tmp_path / "lora.safetensors")
    (tmp_path / "flipped.safetensors").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    (tmp_path / "short.safetensors").write_bytes(data[:100])
    (tmp_path / "newer.safetensors").write_bytes(data.replace(b'\\"format_version\\":1', b'\\"format_version\\":2', 1))
    layer = "unet.a.attn1.to_q"
    lora = LoRA({layer: Factors(torch.randn(8, 2), torch.randn(2, 8))})
    weights = {layer: torch.randn(8, 8)}
    Subspace.fit({"a": lora}, basis="weights", derived_rank=2, weights=weights).save(tmp_path / "weights.safetensors")
    expected = {
        "flipped": "checksum does not match",
        "short": "cut short",
        "newer": "format version 2",
        "lora": "no subspace file",
        "weights": "share-diffusion export",
    }
    for name, words in expected.items():
        done = alone(LOAD + "reader.read(sys.argv[1])", tmp_path / f"{name}.safetensors")
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ValueError: "), (name, done.stderr)
        assert words in last


def test_the_pack_imports_nothing_that_comfyui_lacks():
    known = {"__future__", "collections", "comfy", "dataclasses", "folder_paths", "functools", "hashlib", "json", "math"}
    known |= {"os", "re", "safetensors", "torch", "typing", "transformers", "tempfile"}
    for path in PACK.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) <= known, path
