"""Facts about the ComfyUI nodes: they read what the library writes, mix it to the same update, and import none of it.

The nodes themselves run inside a real ComfyUI where COMFYUI_DIR names one.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy
import pytest
import torch
from drawn_columns import draw_principal
from PIL import Image
from ports import free_port
from safetensors.torch import load_file

from share_diffusion import storage
from share_diffusion.blend import Blend
from share_diffusion.lora import Factors, LoRA
from share_diffusion.patch import make_patch, write_patch
from share_diffusion.subspace import Origin, Subspace

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "app" / "comfyui"
COMFYUI = os.environ.get("COMFYUI_DIR")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)  # ComfyUI mostly lives in an environment of its own

# The package's own __init__ needs ComfyUI; its reading and mixing do not.
LOAD = f"""
import sys, types
pack = types.ModuleType("pack")
pack.__path__ = [{str(PACK)!r}]
sys.modules["pack"] = pack
from pack import mixing, reader
"""

# Mixes every text, or tells why not; many at once, since starting Python with torch is what takes the time.
MIX = (
    LOAD
    + """
import json
from safetensors.torch import save_file
file, texts, folder = sys.argv[1:]
held, said = reader.read(file), []
for number, text in enumerate(json.loads(texts)):
    try:
        save_file(mixing.mixed(held, mixing.parse(text)), f"{folder}/{number}.safetensors")
        said.append("")
    except ValueError as error:
        said.append(str(error))
print(json.dumps({"concepts": {one.name: [one.kind, one.trigger] for one in held.concepts.values()}, "said": said,
                  "foreign": [name for name in sys.modules if name.partition(".")[0] in ("share_diffusion", "diffusers")]}))
"""
)
READ = (
    LOAD
    + """
import json
for path in sys.argv[1:]:
    try:
        reader.read(path)
    except ValueError as error:
        print(json.dumps(str(error)))
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

    empty = Subspace() if origin == "adapters" else Subspace(origin=Origin(origin, 6))
    if origin == "activations":  # one layer was not measured
        sizes = {path: shape[:2] for path, shape in list(shapes.items())[1:]}
        principal = draw_principal(sizes, {path: shapes[path][2] for path in sizes})
        empty = Subspace(origin=Origin(origin, 6, principal=principal))
    about = {"ink wash": {"trigger": "inkw"}, "owl": {"kind": "subject", "trigger": "owlie"}}
    return empty.merge({"ink wash": lora(list(shapes), 3), "owl": lora(list(shapes)[1:4], 2)}, about=about)


def mixed(file, texts, folder):
    """What the pack says about each text, having written what it makes of it into the folder."""
    done = alone(MIX, file, json.dumps(texts), folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def named(tensors, layer):
    """(up, down) of a layer in a LoRA of the pack."""
    component, _, module = layer.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
    return tuple(tensors[f"{prefix}{module.replace('.', '_')}.lora_{side}.weight"] for side in ("up", "down"))


@pytest.mark.parametrize("origin", ["adapters", "random", "activations"])
def test_a_mix_is_what_the_library_blends(tmp_path, origin):
    texts = ["ink wash:0.8, owl:-0.4", "ink wash:0.8 + owl:-0.4", '"owl"', "ink wash:0, owl:1e-1"]
    subspace(origin).save(tmp_path / "two.safetensors")
    said = mixed(tmp_path / "two.safetensors", texts, tmp_path)
    assert (said["foreign"], said["said"]) == ([], [""] * 4)
    assert said["concepts"].items() >= {"ink wash": ["style", "inkw"], "owl": ["subject", "owlie"]}.items()
    held = Subspace.load(tmp_path / "two.safetensors")
    for number, text in enumerate(texts):
        cores = held.blend(Blend.parse(text.replace(",", " +")).weights)
        tensors = load_file(tmp_path / f"{number}.safetensors")
        assert len(tensors) == 2 * len(cores)
        for layer, core in cores.items():
            up, down = named(tensors, layer)
            assert down.ndim == (4 if layer in held.kernels else 2)
            expected = held.layers[layer].beta @ core @ held.layers[layer].alpha.mT
            assert (up.flatten(1) @ down.flatten(1) - expected).norm() <= 1e-6 * expected.norm()


def test_one_concept_is_the_librarys_lora_to_the_bit_and_nonsense_is_told(tmp_path):
    wrong = ["ink wash:x", "ink wash owl:", "owl:0.5, owl:1", "owl,", "nobody", "owl:nan", ": 3", "owl:1e999"]
    subspace().save(tmp_path / "two.safetensors")
    said = mixed(tmp_path / "two.safetensors", ["owl", *wrong], tmp_path)["said"]
    assert said[0] == ""
    assert [text for text, error in zip(wrong, said[1:], strict=True) if not error] == []
    tensors = load_file(tmp_path / "0.safetensors")
    for layer, factors in Subspace.load(tmp_path / "two.safetensors").lora("owl").layers.items():
        up, down = named(tensors, layer)
        assert torch.equal(up.flatten(1), factors.up)
        assert torch.equal(down.flatten(1), factors.down)


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
    write_patch(make_patch(held := subspace(), "sent", held.lora("owl")), tmp_path / "sent.safetensors")
    storage.write(tmp_path / "other.safetensors", {"x": torch.ones(1)}, {"layers": []}, expected_generation=None)
    expected = {
        "sent": "is a patch",
        "other": "another file of Share",
        "flipped": "checksum does not match",
        "short": "cut short",
        "newer": "format version 2",
        "lora": "no subspace file",
        "weights": "share-diffusion export",
    }
    done = alone(READ, *(tmp_path / f"{name}.safetensors" for name in expected))
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [name in one and words in one for (name, words), one in zip(expected.items(), said, strict=True)] == [True] * 7


def test_the_pack_imports_nothing_that_comfyui_lacks():
    known = {"__future__", "collections", "comfy", "dataclasses", "folder_paths", "functools", "hashlib", "json", "math"}
    known |= {"os", "re", "safetensors", "torch", "typing", "transformers", "tempfile"}
    pairs = {(name, "") for name in known} | {("", name) for name in known}
    for path in PACK.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"^(?:import (\w+)|from (\w+)[\w.]* import)", text, re.MULTILINE)) <= pairs, path


INSIDE = """
import importlib.util, sys
folder, pack, export, subspace = sys.argv[1:]
sys.argv = ["comfyui", "--cpu"]
sys.path.insert(0, folder)
import comfy.options
comfy.options.enable_args_parsing()
import comfy.lora, comfy.sd, comfy.utils, nodes, torch
spec = importlib.util.spec_from_file_location("share_pack", pack + "/__init__.py", submodule_search_locations=[pack])
module = importlib.util.module_from_spec(spec)
sys.modules["share_pack"] = module
spec.loader.exec_module(module)
from share_pack import base, nodes as ours
model, clip, vae, latent = base.open_base(export + "/models/share/tiny.base.safetensors")
lora = comfy.utils.load_torch_file(export + "/models/loras/blend.safetensors", safe_load=True)
known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {}))
matched = len(comfy.lora.load_lora(lora, known))
by_file = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
by_node = ours.applied(model, clip, ours.read(subspace), ours.parse("ink:0.8, owl:-0.5"), 1.0)[:2]

def draw(model, clip):
    encode = nodes.CLIPTextEncode().encode
    prompts = encode(clip, "a red cat")[0], encode(clip, "")[0]
    samples = nodes.common_ksampler(model, 0, 2, 3.0, "ddim", "sgm_uniform", *prompts, latent)[0]
    return vae.decode(samples["samples"])

from safetensors.torch import save_file
pictures = {"base": draw(model, clip), "file": draw(*by_file), "node": draw(*by_node)}
states = nodes.CLIPTextEncode().encode(clip, "a red cat")[0][0][0]
decoded = vae.decode(torch.linspace(-1, 1, 8 * 16 * 16).reshape(1, 8, 16, 16))
said = {**pictures, "states": states.clone(), "decoded": decoded, "matched": torch.tensor(matched)}
save_file({name: tensor.contiguous() for name, tensor in said.items()}, export + "/said.safetensors")
"""


@pytest.mark.slow
def test_inside_comfyui_the_nodes_draw_what_the_exported_lora_draws(tmp_path):
    if not COMFYUI:
        pytest.skip("no copy of ComfyUI at hand; set COMFYUI_DIR to run the nodes inside it")
    from share_diffusion.base import load_base
    from share_diffusion.export import export
    from share_diffusion.models.identity import identify
    from share_diffusion.models.layers import select, shape_of

    pipeline, generator = load_base("tiny"), torch.Generator().manual_seed(5)

    def lora():
        shapes = {path: shape_of(module)[0] for path, module in select(pipeline).items()}
        return LoRA(
            {
                path: Factors(torch.randn(out, 2, generator=generator) / 8, torch.randn(2, width, generator=generator) / 8)
                for path, (out, width) in shapes.items()
            }
        )

    made = Subspace(base=identify(pipeline, "tiny")).merge({"ink": lora(), "owl": lora()})
    made.save(tmp_path / "two.safetensors")
    blend, folder = "ink:0.8 + owl:-0.5", tmp_path / "blend"
    done = export(made, blend, folder, "comfyui", pipeline=pipeline, dtype=torch.float32, preview=False)
    words = [COMFYUI, PACK, folder, tmp_path / "two.safetensors"]
    ran = subprocess.run([PYTHON, "-c", INSIDE, *map(str, words)], capture_output=True, text=True)
    if "ModuleNotFoundError" in ran.stderr:
        pytest.skip(f"ComfyUI's requirements are not installed here: {ran.stderr.strip().splitlines()[-1]}")
    assert ran.returncode == 0, ran.stderr
    said = load_file(folder / "said.safetensors")
    assert int(said["matched"]) == len(made.layers) == done.verdicts[-1].present // 3
    assert (said["file"] - said["base"]).abs().mean() > 1e-3
    assert (said["file"] - said["node"]).abs().max() < 0.5 / 255
    # The embedded base itself: its text encoder and VAE inside ComfyUI are those of diffusers.
    tokens = pipeline.tokenizer("a red cat", padding="max_length", max_length=48, return_tensors="pt").input_ids
    assert (said["states"] - pipeline.text_encoder(tokens)[0]).abs().max() < 1e-3
    decoded = pipeline.vae.decode(torch.linspace(-1, 1, 8 * 16 * 16).reshape(1, 8, 16, 16)).sample
    assert (said["decoded"] - (decoded / 2 + 0.5).clamp(0, 1).movedim(1, -1)).abs().max() < 1e-4


class Comfy:
    """A running ComfyUI over a folder of its own, asked through its HTTP interface."""

    def __init__(self, folder):
        self.port = free_port()
        words = [PYTHON, "main.py", "--cpu", "--port", self.port, "--base-directory", folder, "--disable-api-nodes"]
        self.log = folder / "log.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(list(map(str, words)), cwd=COMFYUI, stdout=log, stderr=subprocess.STDOUT)

    def ask(self, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def wait(self, ready, seconds=300):
        """Return what `ready` returns once it returns something; None where ComfyUI ends or is too slow."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if (found := ready()) is not None:
                    return found
            time.sleep(0.5)
        return None

    def draw(self, workflow):
        """Run a workflow and return its picture, or the whole of what ComfyUI says of it."""
        number = json.loads(self.ask("/prompt", {"prompt": workflow}))["prompt_id"]
        said = self.wait(lambda: json.loads(self.ask(f"/history/{number}")).get(number))
        pictures = [picture for output in said["outputs"].values() for picture in output.get("images", ())]
        assert len(pictures) == 1, said["status"]
        query = urllib.parse.urlencode({key: pictures[0][key] for key in ("filename", "subfolder", "type")})
        return Image.open(io.BytesIO(self.ask(f"/view?{query}"))).convert("RGB")


@pytest.mark.slow
def test_the_written_workflow_draws_through_comfyuis_http_interface(tmp_path):
    if not COMFYUI:
        pytest.skip("no copy of ComfyUI at hand; set COMFYUI_DIR to draw a workflow in it")
    from share_diffusion.base import load_base
    from share_diffusion.export import export

    shipped = ROOT / "share_diffusion" / "assets" / "concepts.safetensors"
    home, blend = tmp_path / "a folder", "watercolor:0.8 + owl:0.6"
    export(Subspace.load(shipped), blend, home, "comfyui", pipeline=load_base("tiny"), dtype=torch.float32, preview=False)
    (home / "custom_nodes").mkdir()
    (home / "custom_nodes" / "share").symlink_to(PACK, target_is_directory=True)
    shutil.copy(shipped, home / "models" / "share" / "concepts.safetensors")
    (written,) = (home / "user/default/api").glob("*.json")
    by_file = json.loads(written.read_text())
    (loader,) = (number for number, node in by_file.items() if node["class_type"] == "LoraLoader")
    by_node = json.loads(written.read_text())
    given = {name: by_file[loader]["inputs"][name] for name in ("model", "clip")}
    by_node[loader] = {
        "class_type": "ShareMix",
        "inputs": {**given, "file": "concepts.safetensors", "mix": "watercolor:0.8, owl:0.6", "strength": 1.0},
    }
    comfy = Comfy(home)
    try:
        alive = comfy.wait(lambda: comfy.ask("/system_stats"))
        if alive is None and "ModuleNotFoundError" in comfy.log.read_text():
            pytest.skip(f"ComfyUI's requirements are not installed here: {comfy.log.read_text().strip().splitlines()[-1]}")
        assert alive is not None, comfy.log.read_text()[-1500:]
        from_file, from_node = comfy.draw(by_file), comfy.draw(by_node)
    finally:
        comfy.process.terminate()
        comfy.process.wait(30)
    first, second = (torch.from_numpy(numpy.array(picture)).float() for picture in (from_file, from_node))
    assert first.std() > 10  # a picture, not a blank
    assert (first - second).abs().max() <= 1
