"""Facts about exports: attached, fused and what diffusers and PEFT make of the files are one and the same model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_pipelines import small_sd, small_sdxl

from share_diffusion.__main__ import main
from share_diffusion.attached import attach
from share_diffusion.base import quiet
from share_diffusion.blend import Blend
from share_diffusion.drawing import read_settings
from share_diffusion.export import FORMATS, export
from share_diffusion.export.checkpoint import velocity_entries, write_checkpoint
from share_diffusion.export.family import OTHER, SD1, SD2, SDXL
from share_diffusion.export.filename import name_problem, safe_name
from share_diffusion.export.fuse import fused
from share_diffusion.export.metadata import body_hash
from share_diffusion.export.pipeline import write_pipeline
from share_diffusion.export.weighted import cores_of, weighted
from share_diffusion.export.whole import staged
from share_diffusion.export.workflow import Drawing, Link, Node, api_json, nodes, page_json
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Subspace

BLEND = "ink:0.8 + owl:-0.5"
LORA_FORMATS = ("kohya", "diffusers", "diffusers-old")


def random_lora(pipeline: Any, rank: int, seed: int, targets: str = "attention") -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in select(pipeline, targets).items():
        (out, width), kernel = shape_of(module)
        up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
        layers[path] = Factors(up / math.sqrt(out), down / math.sqrt(width), kernel)
    return LoRA(layers)


def subspace_on(pipeline: Any, targets: str = "attention") -> Subspace:
    about = {
        "ink": {"trigger": "inkstyle", "details": {"prompts": ["a inkstyle cat"], "license": "CC0-1.0"}},
        "owl": {"kind": "subject", "trigger": "owlie"},
    }
    loras = {"ink": random_lora(pipeline, 3, 1, targets), "owl": random_lora(pipeline, 2, 2, targets)}
    return Subspace(base=identify(pipeline, "small")).merge(loras, about=about)


@pytest.fixture(scope="module")
def sd() -> Any:
    return small_sd()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return small_sdxl()


@pytest.fixture(scope="module")
def subspace(sd: Any) -> Subspace:
    return subspace_on(sd)


@pytest.fixture(scope="module")
def wide(sd: Any) -> Subspace:
    """Linear layers and convolutions of every kind."""
    return subspace_on(sd, r"attn|ff\.net|proj_in|resnets.*conv1|time_emb_proj|samplers|q_proj|mlp")


def picture(pipeline: Any) -> torch.Tensor:
    """The latents after two steps without guidance, which would multiply the rounding: text encoders and denoiser."""
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("a b c", num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="latent")
    return drawn.images.float()


def apart(one: torch.Tensor, other: torch.Tensor, base: torch.Tensor) -> float:
    """The difference of two pictures, relative to what the blend does to the base's."""
    return float((one - other).norm() / (one - base).norm())


def attached(pipeline: Any, subspace: Subspace, blend: str) -> torch.Tensor:
    with attach(pipeline, subspace) as handle:
        handle.set_blend(blend)
        return picture(pipeline)


def dense(lora: LoRA) -> dict[str, torch.Tensor]:
    return {layer: factors.up.double() @ factors.down.double() for layer, factors in lora.layers.items()}


def test_a_blend_is_the_weighted_sum_of_its_concepts(wide: Subspace) -> None:
    one, two = dense(wide.lora("ink")), dense(wide.lora("owl"))
    made = weighted(wide, wide.blend({"ink": 0.8, "owl": -0.5}))
    assert made.error < 1e-6
    for layer, matrix in dense(made.lora).items():
        expected = 0.8 * one[layer] - 0.5 * two[layer]
        assert (matrix - expected).norm() <= 1e-5 * expected.norm()
        assert made.lora.layers[layer].rank <= 5


def test_a_truncation_is_the_best_one_and_its_error_is_told(wide: Subspace) -> None:
    cores = wide.blend({"ink": 0.8, "owl": -0.5})
    full, cut = dense(weighted(wide, cores).lora), weighted(wide, cores, rank=2)
    total = sum(float(matrix.square().sum()) for matrix in full.values())
    tails = sum(float(torch.linalg.svdvals(matrix)[2:].square().sum()) for matrix in full.values())
    lost = sum(float((full[layer] - matrix).square().sum()) for layer, matrix in dense(cut.lora).items())
    assert cut.rank == 2
    assert cut.error == pytest.approx(math.sqrt(tails / total), rel=1e-4)
    assert cut.error == pytest.approx(math.sqrt(lost / total), rel=1e-4)


def test_a_blend_of_nothing_is_refused(subspace: Subspace, tmp_path: Path) -> None:
    for blend in ("", "ink:0"):
        with pytest.raises(ValueError, match="changes nothing"):
            export(subspace, blend, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", LORA_FORMATS)
def test_a_lora_file_holds_the_blend(wide: Subspace, tmp_path: Path, format: str) -> None:
    done = export(wide, BLEND, tmp_path / "blend.safetensors", format, dtype=torch.float32)
    expected = dense(weighted(wide, wide.blend({"ink": 0.8, "owl": -0.5})).lora)
    found = dense(LoRA.read(done.path))
    assert found.keys() == expected.keys()
    assert all((found[layer] - matrix).norm() <= 1e-6 * matrix.norm() for layer, matrix in expected.items())


@pytest.mark.parametrize("format", LORA_FORMATS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_diffusers_attached_and_fused_are_one_model(
    sd: Any, subspace: Subspace, tmp_path: Path, format: str, dtype: torch.dtype, bound: float
) -> None:
    same_in_diffusers(sd, subspace, tmp_path, format, dtype, bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_diffusers_attached_and_fused_are_one_sdxl(sdxl: Any, tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    subspace = subspace_on(sdxl)
    assert {layer.partition(".")[0] for layer in subspace.layers} == {"unet", "text_encoder", "text_encoder_2"}
    for format in ("kohya", "diffusers"):
        same_in_diffusers(sdxl, subspace, tmp_path / format, format, dtype, bound)


def same_in_diffusers(pipeline: Any, subspace: Subspace, folder: Path, format: str, dtype: torch.dtype, bound: float) -> None:
    base, live = picture(pipeline), attached(pipeline, subspace, BLEND)
    done = export(subspace, BLEND, folder / "blend.safetensors", format, dtype=dtype)
    with fused(pipeline, LoRA.read(done.path)):
        melted = picture(pipeline)
    assert torch.equal(picture(pipeline), base)
    with quiet():
        pipeline.load_lora_weights(str(done.path.parent), weight_name=done.path.name)
    try:
        loaded = picture(pipeline)
    finally:
        pipeline.unload_lora_weights()
    assert apart(live, melted, base) < bound
    assert apart(live, loaded, base) < bound


def test_peft_reads_its_folder(sd: Any, wide: Subspace, tmp_path: Path) -> None:
    import copy

    from peft import PeftModel

    base, live = picture(sd), attached(sd, wide, BLEND)
    done = export(wide, BLEND, tmp_path / "peft", "peft", pipeline=sd, dtype=torch.float32, preview=False)
    assert {path.name for path in done.path.iterdir()} == {"unet", "text_encoder"}
    other = copy.deepcopy(sd)
    other.unet = PeftModel.from_pretrained(other.unet, done.path / "unet").merge_and_unload()
    other.text_encoder = PeftModel.from_pretrained(other.text_encoder, done.path / "text_encoder").merge_and_unload()
    assert apart(live, picture(other), base) < 1e-5
    assert all(verdict.matched == verdict.present for verdict in done.verdicts)


def test_peft_names_need_no_base(sd: Any, subspace: Subspace, tmp_path: Path) -> None:
    export(subspace, "ink", tmp_path / "with", "peft", pipeline=sd, preview=False)
    export(subspace, "ink", tmp_path / "without", "peft")
    for name in ("unet", "text_encoder"):
        one, other = (load_file(tmp_path / kind / name / "adapter_model.safetensors") for kind in ("with", "without"))
        assert one.keys() == other.keys()


def test_a_pipeline_folder_draws_the_same(sd: Any, subspace: Subspace, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    base, live = picture(sd), attached(sd, subspace, BLEND)
    done = export(subspace, BLEND, tmp_path / "folder", "pipeline", pipeline=sd, dtype=torch.float32, preview=False)
    with quiet():
        again = StableDiffusionPipeline.from_pretrained(done.path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert apart(live, picture(again), base) < 1e-5
    # What programs with an older transformers need.
    assert all(key.startswith("text_model.") for key in load_file(done.path / "text_encoder" / "model.safetensors"))
    assert (done.path / "tokenizer" / "vocab.json").is_file()
    assert (done.path / "tokenizer" / "merges.txt").is_file()


@pytest.mark.parametrize("format", ["peft", "pipeline"])
def test_no_picture_is_drawn_for_a_format_that_has_no_place_for_it(
    sd: Any, subspace: Subspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr("share_diffusion.export.formats.draw_preview", lambda *_: pytest.fail("a preview was drawn"))
    assert export(subspace, "ink", tmp_path / "folder", format, pipeline=sd).files


@pytest.mark.parametrize("build", [small_sd, lambda: small_sd(linear=True), small_sdxl], ids=["sd1", "sd2", "sdxl"])
def test_a_checkpoint_comes_back_bit_for_bit(build: Any, request: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    pipeline, name = build(), request.node.callspec.id
    family, kind = {
        "sd1": (SD1, StableDiffusionPipeline),
        "sd2": (SD2, StableDiffusionPipeline),
        "sdxl": (SDXL, StableDiffusionXLPipeline),
    }[name]
    (tmp_path / "config").mkdir()
    write_pipeline(pipeline, tmp_path / "config", torch.float32)
    write_checkpoint(pipeline, family, tmp_path / "one.safetensors", torch.float32, {})
    with quiet():
        again = kind.from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "config"), local_files_only=True)
    again.set_progress_bar_config(disable=True)
    again.scheduler = pipeline.scheduler
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (module := getattr(pipeline, part, None)) is not None:
            ours, theirs = module.state_dict(), getattr(again, part).state_dict()
            assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert torch.allclose(picture(pipeline), picture(again), rtol=0, atol=1e-5)


def test_a_fused_export_needs_its_own_base(sd: Any, subspace: Subspace, sdxl: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the base"):
        export(subspace, BLEND, tmp_path / "x.safetensors", "checkpoint")
    with pytest.raises(ValueError, match="wrong base"):
        export(subspace, BLEND, tmp_path / "x", "pipeline", pipeline=sdxl)
    with pytest.raises(ValueError, match="no single-file checkpoint"):
        export(subspace, BLEND, tmp_path / "x.safetensors", "checkpoint", pipeline=sd, preview=False)
    assert not list(tmp_path.iterdir())


def test_all_problems_are_told_at_once_and_nothing_is_written(subspace: Subspace, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        export(subspace, BLEND, tmp_path / "CON", "kohya", rank=0, dtype=torch.int8)
    for words in ("must end in .safetensors", "reserved by Windows", "rank is 0", "int8"):
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_values_beyond_half_precision_are_refused(sd: Any, tmp_path: Path) -> None:
    lora = random_lora(sd, 2, 3)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    huge = LoRA({**lora.layers, layer: Factors(lora.layers[layer].up * 1e11, lora.layers[layer].down)})
    subspace = Subspace(base=identify(sd, "small")).merge({"huge": huge})
    with pytest.raises(ValueError, match="out of float16's range"):
        export(subspace, "huge", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"leaves the range of float16.*float32"):
        export(subspace, "huge", tmp_path / "x", "pipeline", pipeline=sd, preview=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "blend",
    ["ink:1e39", "ink:1e39 + owl", "ink:1e20[blocks=down:1e20]", *(f"ink:-1e39 + owl | {name}" for name in ("ties", "dare"))],
)
def test_a_weight_that_overflows_is_refused_with_the_largest_that_fits(subspace: Subspace, tmp_path: Path, blend: str) -> None:
    with pytest.raises(ValueError, match=r"ink: .*leaves the range of float32; weights up to about (\S+) fit") as caught:
        export(subspace, blend, tmp_path / "x.safetensors", dtype=torch.float32)
    assert not list(tmp_path.iterdir())
    if blend == "ink:1e39":
        largest = str(caught.value).partition("up to about ")[2].partition(" ")[0]
        done = export(subspace, f"ink:{largest}", tmp_path / "x.safetensors", dtype=torch.float32)
        assert all(torch.isfinite(tensor).all() for tensor in load_file(done.path).values())
        with pytest.raises(ValueError, match="leaves the range"):
            export(subspace, f"ink:{1.02 * float(largest)!r}", tmp_path / "y.safetensors", dtype=torch.float32)


def test_every_method_refuses_weights_that_overflow(subspace: Subspace, tmp_path: Path) -> None:
    from share_diffusion.blend import METHODS

    for method in METHODS:
        for weights in ("ink:1e39 + owl:-1e39", "ink:3e38 + owl:3e38 + ink:3e38[blocks=down]", "ink:1e300 + owl"):
            with pytest.raises(ValueError, match=r"leave[s]? the range of float32"):
                export(subspace, f"{weights} | {method}", tmp_path / "x.safetensors", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_the_file_tells_what_it_is(sd: Any, subspace: Subspace, tmp_path: Path) -> None:
    done = export(subspace, "ink:0.8 + owl:0", tmp_path / "mine.safetensors", pipeline=sd)
    metadata = LoRA.read(done.path).metadata
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "mine"
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.trigger_phrase"] == "inkstyle"
    assert metadata["modelspec.merged_from"] == "ink"
    assert metadata["modelspec.license"] == "CC0-1.0"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert metadata["sshs_model_hash"] == body_hash(done.path) == metadata["modelspec.hash_sha256"][2:]
    beside = json.loads(done.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert beside["activation text"] == "inkstyle"
    assert beside["preferred weight"] == 1.0
    assert beside["sd version"] == "Unknown"
    assert read_settings(done.path.with_suffix(".png"))["prompt"] == "a inkstyle cat"
    assert np.asarray(Image.open(done.path.with_suffix(".png"))).std() > 0
    one = done.path.read_bytes()
    export(subspace, "ink:0.8 + owl:0", done.path, pipeline=sd, replace=True)
    assert done.path.read_bytes() == one
    assert str(tmp_path) not in one.decode("latin-1")


def test_concepts_whose_terms_cancel_are_still_in_the_file(sd: Any, subspace: Subspace, tmp_path: Path) -> None:
    blend = "ink:1[blocks=down] + ink:-1[blocks=up] + owl:0[blocks=up]"
    done = export(subspace, blend, tmp_path / "mine.safetensors", pipeline=sd)
    metadata = LoRA.read(done.path).metadata
    assert metadata["modelspec.trigger_phrase"] == "inkstyle"
    assert metadata["modelspec.merged_from"] == "ink"
    assert metadata["modelspec.license"] == "CC0-1.0"
    assert json.loads(done.path.with_suffix(".json").read_text(encoding="utf-8"))["activation text"] == "inkstyle"
    assert read_settings(done.path.with_suffix(".png"))["prompt"] == "a inkstyle cat"


def predictions(pipeline: Any, folder: Path) -> set[str | None]:
    """What exports with and without the base at hand say that it predicts."""
    subspace = subspace_on(pipeline)
    export(subspace, "ink", folder / "with.safetensors", pipeline=pipeline, preview=False)
    export(subspace, "ink", folder / "without.safetensors")
    without = LoRA.read(folder / "without.safetensors").metadata
    assert "modelspec.prediction_type" not in without
    return {LoRA.read(folder / "with.safetensors").metadata.get("modelspec.prediction_type")}


def test_what_the_base_predicts_is_told_as_modelspec_spells_it(tmp_path: Path) -> None:
    """ModelSpec: "In Stable Diffusion, `v` or `epsilon`"; a flow model has neither, and shapes alone do not tell."""
    import tiny_models

    assert predictions(small_sd(), tmp_path / "noise") == {"epsilon"}
    assert predictions(small_sd(prediction_type="v_prediction"), tmp_path / "velocity") == {"v"}
    assert predictions(tiny_models.build_sd3(), tmp_path / "flow") == {None}


def test_a_checkpoint_and_its_metadata_agree_on_velocity() -> None:
    from share_diffusion.export.family import SD3, predicted
    from share_diffusion.export.metadata import About, modelspec

    velocity = small_sdxl()
    velocity.scheduler = type(velocity.scheduler).from_config(velocity.scheduler.config, prediction_type="v_prediction")
    said = modelspec(About("x", Blend({}), SDXL, prediction=predicted(velocity)), SDXL.modelspec)
    assert said["modelspec.prediction_type"] == "v"
    assert "v_pred" in velocity_entries(velocity, SDXL)
    assert "modelspec.prediction_type" not in modelspec(About("x", Blend({}), SD3), SD3.modelspec)


def test_a_stock_family_is_known_by_its_shapes(tmp_path: Path) -> None:
    attn = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    for width, kohya, sidecar in ((768, "sd_v1", "SD1"), (1024, "sd_v2", "SD2"), (2048, "sdxl_base_v1-0", "SDXL")):
        layers = {
            f"{attn}.to_q": Factors(torch.randn(640, 2), torch.randn(2, 640)),
            f"{attn}.to_k": Factors(torch.randn(640, 2), torch.randn(2, width)),
        }
        subspace = Subspace().merge({"a": LoRA(layers)})
        done = export(subspace, "a", tmp_path / f"{width}.safetensors")
        assert LoRA.read(done.path).metadata["ss_base_model_version"] == kohya
        assert json.loads(done.path.with_suffix(".json").read_text())["sd version"] == sidecar
        assert all(verdict.matched == verdict.present == 6 for verdict in done.verdicts)


@pytest.mark.parametrize("name", ["../../x", "CON", "nul.txt", "a. ", "x:y", "C:\\x", "é" * 90, "", "..", "-rf", "a\u202eb"])
def test_every_name_becomes_a_safe_file_name(name: str) -> None:
    made = safe_name(name)
    assert name_problem(f"{made}.safetensors") is None
    assert Path(made).name == made != name
    assert len(made.encode()) <= 80


def test_good_names_stay_and_no_two_meet() -> None:
    assert [safe_name(name) for name in ("watercolor", "my-cat 2", "Straße", "水彩")] == [
        "watercolor",
        "my-cat 2",
        "Straße",
        "水彩",
    ]
    assert len({safe_name(name) for name in ("a:b", "a?b", "a_b", "é" * 90, "é" * 91)}) == 5


def put(folder: Path, files: dict[str, str], fail: bool = False, replace: bool = False) -> None:
    """Stage these files for a folder; fail in the middle if asked to."""
    with staged(folder, replace=replace) as stage:
        for name, text in files.items():
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(text)
        if fail:
            raise RuntimeError


def test_an_export_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError):
        put(tmp_path, {"a": "new"}, fail=True, replace=True)
    with pytest.raises(ValueError, match="already there"):
        put(tmp_path, {"a": "new", "b": "new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}
    put(tmp_path, {"a": "new", "b/c": "new"}, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "c").read_text() == "new"


def test_a_move_that_fails_puts_the_old_files_back(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="cannot write"):
        put(tmp_path, {"a": "new", "b/c": "new"}, replace=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert (tmp_path / "a").read_text() == "old"


def test_nothing_is_overwritten_unasked(subspace: Subspace, tmp_path: Path) -> None:
    for format in FORMATS:
        if format not in ("pipeline", "checkpoint", "comfyui"):
            place = tmp_path / (format if format == "peft" else f"{format}.safetensors")
            export(subspace, "ink", place, format)
            with pytest.raises(ValueError, match="--replace"):
                export(subspace, "owl", place, format)
            export(subspace, "owl", place, format, replace=True)


def test_the_two_forms_of_a_workflow_say_the_same() -> None:
    base = Node("ShareBase", "the embedded base", {}, {"base": "tiny"}, ("MODEL", "CLIP", "VAE", "LATENT"))
    stock = Node("CheckpointLoaderSimple", "the base", {}, {"ckpt_name": "x.safetensors"}, ("MODEL", "CLIP", "VAE"))
    for first in (base, stock):
        made = nodes(first, "blend.safetensors", Drawing("a cat", 64, 25, 3.0, "ddim", "sgm_uniform", "blend"))
        api, page = api_json(made), page_json(made)
        ends = {link[0]: link for link in page["links"]}
        for node in page["nodes"]:
            twin = api[str(node["id"])]
            assert twin["class_type"] == node["type"]
            linked = {entry["name"]: ends[entry["link"]] for entry in node["inputs"]}
            assert {name: [str(link[1]), link[2]] for name, link in linked.items()} == {
                name: value for name, value in twin["inputs"].items() if isinstance(value, list)
            }
            shown = [value for name, value in made[node["id"] - 1].widgets.items()]
            assert node["widgets_values"] == shown
        for node in made:
            for link in node.inputs.values():
                assert made[link.node - 1].outputs[link.slot] == link.kind
    assert isinstance(Link(1, 0, "MODEL"), Link)


def test_the_command_writes_each_concept_and_says_what_matches(
    sd: Any, subspace: Subspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "two.safetensors"
    subspace.save(file)
    words = ["export", str(file), "--output", str(tmp_path / "each")]
    assert main([*words, "--each", "--rank", "1"]) == 0
    said = capsys.readouterr().out
    assert "rank 1, truncated: relative error" in said
    assert "sd-scripts" in said
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [
        f"{name}.{end}" for name, end in itertools.product(("ink", "owl"), ("json", "safetensors"))
    ]
    assert main([*words, "--each"]) == 1
    assert "--replace" in capsys.readouterr().err
    assert main(["verify-export", str(tmp_path / "each" / "ink.safetensors")]) == 0
    assert "diffusers" in capsys.readouterr().out
    assert main(["verify-export", str(file)]) == 1
    assert "subspace file" in capsys.readouterr().err
    assert main(["export", str(file), "--blend", "nobody", "--output", str(tmp_path / "x.safetensors")]) == 1
    assert "holds: ink, owl" in capsys.readouterr().err
    assert main(["export", str(file), "--blend", "ink", "--format", "pipeline", "--output", str(tmp_path / "p")]) == 1
    assert "--pretrained_model_name_or_path" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_small_base_is_of_no_stock_family(subspace: Subspace, tmp_path: Path) -> None:
    from share_diffusion.export.formats import family_in

    assert family_in(subspace, None) is OTHER


def test_block_groups_and_merge_methods_are_exported_as_they_act():
    pipeline = small_sd()
    subspace = subspace_on(pipeline)
    text = "ink:0.8[blocks=down,text] + owl:-0.5 | norm-equalised"
    cores = cores_of(subspace, Blend.parse(text))
    with attach(pipeline, subspace) as handle:
        handle.set_blend(text)
        for path, layer in handle.layers.items():
            assert (path in cores) == bool(layer.updates)
            for update in layer.updates:
                basis = subspace.layers[path]
                dense = update.beta @ update.alpha.mT
                torch.testing.assert_close(basis.beta @ cores[path] @ basis.alpha.mT, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["ink[steps=0.2..1]", "owl + ink:0.5[region=left]"])
def test_what_changes_over_steps_or_places_is_refused(text, tmp_path):
    subspace = subspace_on(small_sd())
    with pytest.raises(ValueError, match=r"ink: .*cannot be put into weights"):
        export(subspace, text, tmp_path / "blend.safetensors")
    assert not list(tmp_path.iterdir())
