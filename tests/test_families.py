"""Facts about every family of bases, on small random pipelines of the real classes.

The references are the pipelines' own methods: their `encode_prompt`, their schedulers' steps, their packing.
"""

from __future__ import annotations

from typing import Any

import concept
import pytest
import torch
from PIL import Image
from tiny_models import BUILDERS, build_flux, build_sd, build_sd3, build_sdxl, save
from torch import Tensor, nn

from share_diffusion.attached import Attached, attach
from share_diffusion.base import load_base
from share_diffusion.drawing import Sampling, generate
from share_diffusion.layer import Update
from share_diffusion.learning import predict
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models import FAMILIES, family_of
from share_diffusion.models.flux import pack, unpack
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import layers, select, shape_of
from share_diffusion.models.noise import flow_times
from share_diffusion.models.texts import tokenize, too_long
from share_diffusion.objective import add_noise, draw, recover, signal_to_noise, target
from share_diffusion.single_file import recognise
from share_diffusion.subspace import Subspace

NAMES = list(BUILDERS)
CAPTIONS = ["a watercolor painting of a robot", "a cat on the house"]
SMALL = Sampling(steps=2, width=32, height=32)


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(params=NAMES)
def pipeline(request: pytest.FixtureRequest, pipelines: dict[str, Any]) -> Any:
    return pipelines[request.param]


def shape(pipeline: Any) -> tuple[int, int, int]:
    return family_of(pipeline).latent_shape(pipeline, (32, 32))


def some(pipeline: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and times of two pictures."""
    generator = torch.Generator().manual_seed(seed)
    drawn = draw(pipeline, 2, 2, shape(pipeline), seed, 0)
    return torch.randn(2, *shape(pipeline), generator=generator), drawn.noise, drawn.times


def random_lora(pipeline: Any, seed: int, strength: float = 0.3) -> LoRA:
    """An update of every layer of the preset `attention`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, module in select(pipeline).items():
        (out, width), _ = shape_of(module)
        up, down = torch.randn(out, 2, generator=generator), torch.randn(2, width, generator=generator)
        found[path] = Factors(strength * up / (2 * width) ** 0.5, down)
    return LoRA(found)


def test_every_pipeline_has_exactly_one_family(pipeline):
    assert sum(family.owns(pipeline) for family in FAMILIES) == 1
    family = family_of(pipeline)
    assert set(family.components(pipeline)) == {path.partition(".")[0] for path in layers(pipeline)}
    assert set(family.components(pipeline)) <= set(family.kohya_prefixes)


def test_an_unknown_pipeline_is_refused_with_the_known_families():
    with pytest.raises(ValueError, match=r"NoneType is of no known family.*Stable Diffusion XL.*FLUX\.1"):
        family_of(None)


def test_what_is_predicted_recovers_the_latents(pipeline):
    latents, noise, times = some(pipeline)
    noisy = add_noise(pipeline, latents, noise, times)
    wanted = target(pipeline, latents, noise, times)
    torch.testing.assert_close(recover(pipeline, noisy, wanted, times), latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_noise_and_targets_are_the_schedulers_own(kind):
    pipeline = build_sd(kind)
    latents, noise, times = some(pipeline)
    noisy = add_noise(pipeline, latents, noise, times)
    assert torch.equal(noisy, pipeline.scheduler.add_noise(latents, noise, times))
    wanted = target(pipeline, latents, noise, times)
    if kind == "v_prediction":
        assert torch.equal(wanted, pipeline.scheduler.get_velocity(latents, noise, times))
    for row, time in enumerate(times):
        pipeline.scheduler.set_timesteps(1000)
        step = pipeline.scheduler.step(wanted[row : row + 1], int(time), noisy[row : row + 1])
        torch.testing.assert_close(step.pred_original_sample[0], latents[row], atol=1e-4, rtol=1e-4)
    alphas = pipeline.scheduler.alphas_cumprod[times]
    torch.testing.assert_close(signal_to_noise(pipeline, times), alphas / (1 - alphas))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_one_step_of_the_flow_scheduler_lands_on_the_latents(pipelines, name):
    """From sigma straight to 0, the scheduler's own Euler step undoes the noise, if the target is what it expects."""
    pipeline = pipelines[name]
    latents, noise, times = some(pipeline)
    scheduler = type(pipeline.scheduler)(shift=1.0)
    for row, time in enumerate(times):
        sigma = float(time) / 1000
        scheduler.set_timesteps(sigmas=[sigma])
        noisy = add_noise(pipeline, latents, noise, times)[row : row + 1]
        stepped = scheduler.step(target(pipeline, latents, noise, times)[row : row + 1], scheduler.timesteps[0], noisy)
        torch.testing.assert_close(stepped.prev_sample[0], latents[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-schnell"])
def test_flow_times_are_shifted_as_the_scheduler_shifts_them(pipelines, name):
    pipeline = pipelines[name]
    spread = torch.linspace(0.1, 0.9, 5)
    ours = flow_times(pipeline, spread, shape(pipeline), "uniform")
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = {"mu": calculate_shift(4 * 4)} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(sigmas=spread.flip(0).tolist(), **mu)
    torch.testing.assert_close(ours, scheduler.timesteps.flip(0), atol=1e-3, rtol=1e-5)


def test_logit_normal_times_have_the_quantiles_of_the_normal():
    pipeline = build_flux(guidance=False)
    spread = (torch.arange(10_000) + 0.5) / 10_000
    sigma = flow_times(pipeline, spread, shape(pipeline), "logit_normal") / 1000
    logits = torch.logit(sigma.double())
    assert abs(logits.mean()) < 1e-3
    assert abs(logits.std() - 1) < 1e-2
    assert flow_times(pipeline, torch.tensor([0.0, 1.0]), shape(pipeline)).isfinite().all()
    with pytest.raises(ValueError, match="logit_normal"):
        flow_times(pipeline, spread, shape(pipeline), "cosmap")


def test_drawing_leaves_training_as_it_was(pipelines):
    """The schedulers keep state between pictures; what noise does must not depend on it."""
    for name in ("sdxl", "sd3", "flux"):
        pipeline = pipelines[name]
        latents, noise, times = some(pipeline)
        before = add_noise(pipeline, latents, noise, times)
        generate(pipeline, ["a cat"], [0], SMALL)
        assert torch.equal(add_noise(pipeline, latents, noise, times), before)
        assert torch.equal(draw(pipeline, 2, 2, shape(pipeline), 0, 0).times, times)


def test_text_is_encoded_as_the_pipeline_encodes_it(pipeline):
    family = family_of(pipeline)
    with torch.no_grad():
        ours = family.encode_text(pipeline, tokenize(family, pipeline, CAPTIONS))
        if family.name == "sd":
            theirs = {"states": pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)[0]}
        elif family.name == "sdxl":
            states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
            theirs = {"states": states, "pooled": pooled}
        elif family.name == "sd3":
            states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
            theirs = {"states": states, "pooled": pooled}
        else:
            length = family.readers(pipeline)["text_encoder_2"].length
            states, pooled, _ = pipeline.encode_prompt(CAPTIONS, max_sequence_length=length)
            theirs = {"states": states, "pooled": pooled}
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
        assert tensor[0].ne(tensor[1]).any()


def test_the_prediction_is_the_one_that_the_pipeline_makes(pipeline, monkeypatch):
    """One step at guidance 1: the tensors that the pipeline hands its denoiser give the same output through `predict`."""
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    forward = denoiser.forward

    def watched(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        seen.append((arguments, keywords, output[0]))
        return output

    monkeypatch.setattr(denoiser, "forward", watched)
    arguments = family.call_arguments(pipeline, ["", ""], 1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    size = {"width": 32, "height": 32, "num_inference_steps": 1, "output_type": "latent"}
    with torch.no_grad():
        pipeline(CAPTIONS, generator=generators, **size, **arguments)
        ((places, keywords, theirs),) = seen
        noisy = keywords.get("hidden_states", places[0] if places else None)
        times = keywords.get("timestep", places[1] if len(places) > 1 else None)
        times = times.expand(2) if times.ndim == 0 else times
        if family.name == "flux":
            noisy, theirs, times = unpack(noisy, 8, 8), unpack(theirs, 8, 8), 1000 * times
        monkeypatch.undo()
        ours = predict(pipeline, noisy, times, tokenize(family, pipeline, CAPTIONS))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_flux_packs_as_the_pipeline_does():
    pipeline = build_flux()
    latents = torch.randn(2, 4, 6, 8)
    theirs = pipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, 6, 8), latents)


def test_sdxl_is_told_sizes_as_the_pipeline_tells_them():
    pipeline = build_sdxl()
    framed = family_of(pipeline).framing(pipeline, [(40, 60)], [(0, 5)], (32, 32))["time_ids"]
    theirs = pipeline._get_add_time_ids((40, 60), (0, 5), (32, 32), torch.float32, text_encoder_projection_dim=64)
    assert torch.equal(framed, theirs)
    latents, _, times = some(pipeline)
    inputs = tokenize(family_of(pipeline), pipeline, CAPTIONS)
    whole = family_of(pipeline).framing(pipeline, [(32, 32)] * 2, [(0, 0)] * 2, (32, 32))
    with torch.no_grad():
        assert torch.equal(predict(pipeline, latents, times, inputs), predict(pipeline, latents, times, inputs | whole))
        cut = family_of(pipeline).framing(pipeline, [(99, 32)] * 2, [(9, 0)] * 2, (32, 32))
        assert not torch.equal(predict(pipeline, latents, times, inputs), predict(pipeline, latents, times, inputs | cut))


def test_the_gradient_reaches_every_layer_that_a_preset_chooses(pipeline):
    """In every component; and none of those left out as idle."""
    family = family_of(pipeline)
    inputs = tokenize(family, pipeline, CAPTIONS)
    latents, noise, times = some(pipeline)
    linear = {path: module for path, module in layers(pipeline).items() if isinstance(module, nn.Linear)}
    attention = [path for path in linear if path in select(pipeline) or path.startswith(family.idle(pipeline) or ("none",))]
    with Attached(pipeline, attention) as attached:
        ups = {}
        updates = {}
        for path, layer in attached.layers.items():
            (out, width), _ = shape_of(layer)
            ups[path] = torch.zeros(out, 2, requires_grad=True)
            updates[path] = [Update(torch.randn(width, 2), (), ups[path])]
        attached.set(updates)
        predicted = predict(pipeline, add_noise(pipeline, latents, noise, times), times, inputs)
        (predicted - target(pipeline, latents, noise, times)).square().mean().backward()
    reached = {path for path, up in ups.items() if up.grad is not None and bool(up.grad.any())}
    assert reached == set(select(pipeline))
    assert {path.partition(".")[0] for path in reached} == set(family.components(pipeline))


def test_pictures_return_from_latents(pipeline):
    family = family_of(pipeline)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = family.encode_pictures(pipeline, pictures)
    assert latents.shape == (2, *shape(pipeline))
    assert family.decode_latents(pipeline, latents).shape == pictures.shape
    vae = pipeline.vae
    with torch.no_grad():
        mean = vae.encode(pictures).latent_dist.mean
    shift = vae.config.shift_factor or 0.0
    torch.testing.assert_close(latents / vae.config.scaling_factor + shift, mean)


def test_attached_equals_fused_and_detached_equals_before(pipeline):
    family = family_of(pipeline)
    lora = random_lora(pipeline, 1)
    subspace = Subspace.fit({"ink": lora}, base=identify(pipeline, "small"))
    subspace = subspace.merge({"neon": random_lora(pipeline, 2)})
    latents, _, times = some(pipeline)
    inputs = tokenize(family, pipeline, CAPTIONS)
    with torch.no_grad():
        base = predict(pipeline, latents, times, inputs)
        with attach(pipeline, subspace) as handle:
            handle.set_blend("ink:0.8 + neon:-0.5")
            live = predict(pipeline, latents, times, inputs)
        weights = {path: (module, module.weight.clone()) for path, module in layers(pipeline).items() if path in lora.layers}
        for path, (module, _) in weights.items():
            module.weight += 0.8 * subspace.lora("ink").layers[path].dense() - 0.5 * subspace.lora("neon").layers[path].dense()
        fused = predict(pipeline, latents, times, inputs)
        for module, weight in weights.values():
            module.weight.copy_(weight)
        assert torch.equal(predict(pipeline, latents, times, inputs), base)
    torch.testing.assert_close(live, fused, atol=2e-4, rtol=2e-3)
    assert not torch.allclose(live, base, atol=1e-3)


def test_a_seed_is_a_picture_and_a_blend_changes_it(pipeline):
    subspace = Subspace.fit({"ink": random_lora(pipeline, 1, 1.0)}, base=identify(pipeline, "small"))
    first = generate(pipeline, CAPTIONS, [1, 2], SMALL)
    with attach(pipeline, subspace) as handle:
        handle.set_blend("ink")
        other = generate(pipeline, CAPTIONS, [1, 2], SMALL)
    again = generate(pipeline, CAPTIONS, [1, 2], SMALL)
    assert [one.tobytes() for one in first] == [one.tobytes() for one in again]
    assert [one.tobytes() for one in first] != [one.tobytes() for one in other]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sd3-without-t5", "flux"])
def test_a_negative_prompt_has_a_say(pipelines, name):
    pipeline = pipelines[name]
    plain = generate(pipeline, ["a cat"], [0], Sampling(2, 4.0, "", 32, 32))
    other = generate(pipeline, ["a cat"], [0], Sampling(2, 4.0, "red house", 32, 32))
    assert plain[0].tobytes() != other[0].tobytes()


def test_a_caption_is_too_long_when_no_encoder_reads_it_all(pipelines):
    long = "robot " * 100
    for name, expected in (("sd", 1), ("sdxl", 1), ("sd3", 0), ("sd3-without-t5", 1), ("flux", 0)):
        pipeline = pipelines[name]
        assert len(too_long(family_of(pipeline), pipeline, ["a cat", long])) == expected, name


@pytest.mark.parametrize("name", ["sd-v", "sdxl", "sd3-without-t5", "flux"])
def test_learn_merge_and_write_from_a_folder(workplace, pipelines, name):
    """The main job on a saved base: two concepts, the first bit-identical after the second, and a LoRA file of it."""
    base = save(pipelines[name], workplace / "base")
    (workplace / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40 + 20 * number, 60), (80 * number, 90, 160)).save(workplace / f"photos/{number}.png")
    words = ["--base", str(base), "--instance_data_dir", "photos", "--instance_prompt", "a photo of [trigger]"]
    words += ["--max_train_steps", "2", "--train_batch_size", "2", "--gradient_batches", "1", "--resolution", "32"]
    for word in ("mycat", "mydog"):
        assert concept.main([*words, "--concept", word, "--no-sheet", "--cpu", "--local_files_only"]) == 0
    subspace = Subspace.load(workplace / "outputs/base/subspace.safetensors")
    assert list(subspace.concepts) == ["mycat", "mydog"]
    loaded = load_base(base, local_files_only=True)
    with attach(loaded, subspace) as handle:
        handle.set_blend("mycat + mydog:0.5")
        assert generate(loaded, ["a photo of mycat"], [0], SMALL)[0].size == (32, 32)
    lora = subspace.lora("mycat")
    lora.write(workplace / "mycat.safetensors", "diffusers")
    again = LoRA.read(workplace / "mycat.safetensors")
    assert set(again.layers) == set(lora.layers)
    for path, factors in lora.layers.items():
        assert (again.layers[path].dense() - factors.dense()).norm() < 2e-3 * factors.dense().norm()  # half precision


def test_a_side_that_the_base_cannot_take_is_refused(workplace, pipelines):
    from share_diffusion.data import read_dataset
    from share_diffusion.learning import prepare

    Image.new("RGB", (40, 40)).save(workplace / "one.png")
    dataset = read_dataset(workplace, trigger="cat", instance_prompt="a cat")
    with pytest.raises(ValueError, match="resolution is 36; with this base it is a multiple of 8"):
        prepare(pipelines["flux"], dataset, 36)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_file_of_the_denoiser_alone_takes_the_rest_from_the_folder_beside_it(tmp_path, pipelines, name):
    from safetensors.torch import save_file

    pipeline = pipelines[name]
    component = family_of(pipeline).denoiser
    state = {key: tensor.contiguous() for key, tensor in getattr(pipeline, component).state_dict().items()}
    save_file(state, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"the file holds the denoiser alone.*put a diffusers folder of the same base"):
        load_base(tmp_path / "mine.safetensors", local_files_only=True)
    save(pipeline, tmp_path / "mine")
    again = load_base(tmp_path / "mine.safetensors", local_files_only=True)
    assert type(again) is type(pipeline)
    for key, tensor in getattr(again, component).state_dict().items():
        assert torch.equal(tensor, state[key])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.a"], "StableDiffusionPipeline"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.a"], "StableDiffusionPipeline"),
        (
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "model.diffusion_model.label_emb.0.0.weight",
                "conditioner.embedders.0.transformer.a",
                "conditioner.embedders.1.model.a",
            ],
            "StableDiffusionXLPipeline",
        ),
        (["model.diffusion_model.joint_blocks.0.x", "text_encoders.clip_l.a"], "StableDiffusion3Pipeline"),
        (["model.diffusion_model.double_blocks.0.img_attn.x", "text_encoders.clip_l.a"], "FluxPipeline"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "FluxPipeline"),
    ],
)
def test_a_checkpoint_is_recognised_by_its_header(tmp_path, keys, expected):
    from safetensors.torch import save_file

    alone = len(keys) == 1
    save_file({key: torch.zeros(1) for key in (keys if alone else [*keys, "first_stage_model.a"])}, tmp_path / "a.safetensors")
    found = recognise(tmp_path / "a.safetensors")
    assert (found.pipeline, found.complete) == (expected, not alone)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "is a LoRA, not a base"),
        ("unet.a.share_alpha", "is a subspace file"),
        ("something.else", "is no checkpoint of a known family"),
        ("conditioner.embedders.0.model.transformer.a", "is no checkpoint|refiner"),
    ],
)
def test_what_is_no_base_is_told(tmp_path, key, expected):
    from safetensors.torch import save_file

    save_file({key: torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=expected):
        load_base(tmp_path / "a.safetensors")


def test_a_broken_file_is_one_message(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a readable"):
        load_base(tmp_path / "a.safetensors")


def test_sampling_defaults_and_names_for_files(pipelines):
    facts = {
        name: (*family_of(one).sampling(one), family_of(one).version(one), family_of(one).architecture(one))
        for name, one in pipelines.items()
    }
    assert facts["sd"][2:] == ("sd_v1", "stable-diffusion-v1")
    second = {kind: build_sd(kind, 1024) for kind in ("epsilon", "v_prediction")}
    assert [family_of(one).version(one) for one in second.values()] == ["sd_v2", "sd_v2_v"]
    named = [family_of(one).architecture(one) for one in second.values()]
    assert named == ["stable-diffusion-v2-512", "stable-diffusion-v2-768-v"]
    assert facts["sdxl"] == (30, 5.0, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
    assert facts["sd3"] == (28, 7.0, "medium", "stable-diffusion-3-medium")
    assert facts["sd35"] == (28, 4.5, "5-medium", "stable-diffusion-3-5-medium")
    assert facts["flux"] == (28, 3.5, "flux1", "flux-1-dev")
    assert facts["flux-schnell"] == (4, 0.0, "flux1", "flux-1-schnell")


def test_builders_give_the_same_weights_every_time():
    first, second = build_sd3(), build_sd3()
    assert identify(first).mismatch(identify(second)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_compiled_denoiser_learns_what_a_plain_one_learns(workplace, pipelines, name, monkeypatch):
    """Traced as torch.compile traces it, in a few graphs that later steps use again; what inductor makes of them is its own."""
    graphs, compiling = [], nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: compiling(self, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    )
    base = save(pipelines[name], workplace / "base")
    (workplace / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (120 * number, 90, 160)).save(workplace / f"photos/{number}.png")
    words = ["--base", str(base), "--instance_data_dir", "photos", "--instance_prompt", "a photo of [trigger]"]
    words += ["--max_train_steps", "4", "--train_batch_size", "2", "--gradient_batches", "1", "--resolution", "32"]
    words += ["--concept", "mycat", "--no-sheet", "--cpu", "--local_files_only"]
    loras = []
    for way in ("plain", "compiled"):
        more = ["--torch_compile"] if way == "compiled" else []
        assert concept.main([*words, *more, "--subspace", f"{way}.safetensors"]) == 0
        loras.append(Subspace.load(workplace / f"{way}.safetensors").lora("mycat"))
    assert 0 < len(graphs) <= 8
    apart = sum((loras[0].layers[path].dense() - loras[1].layers[path].dense()).square().sum() for path in loras[0].layers)
    assert apart.sqrt() < 0.02 * loras[0].norm
