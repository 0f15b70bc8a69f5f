"""Facts about blends in force: each sample its own, over the steps, in block groups, in regions.

The references are the same pipeline drawing one by one, with another blend set by hand at every step, with dW added to
its weights, or with peft's adapters.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_attach import ALL, TO_K, TO_Q, copied, difference, fused, random_lora, refusal, small_pipeline
from torch import Tensor, nn

from share_diffusion.attached import attach
from share_diffusion.blend import Blend
from share_diffusion.cores import frame, narrow, spanned
from share_diffusion.layer import ShareConv, ShareLinear, Update
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.calls import order_of_samples
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import layers, parent_of
from share_diffusion.regions import Field
from share_diffusion.subspace import Subspace

BLENDS = ["ink", "neon:-0.5 + ink:0.3", "", "flat:1.5"]


@pytest.fixture(scope="module")
def original() -> Any:
    return small_pipeline()


@pytest.fixture(scope="module")
def subspace(original: Any) -> Subspace:
    """Two concepts in every layer, one in the linear layers of the UNet only."""
    loras = {"ink": random_lora(original, 1), "neon": random_lora(original, 2)}
    flat = random_lora(original, 3, lambda path: path.startswith("unet") and isinstance(layers(original)[path], nn.Linear))
    return Subspace.fit(loras | {"flat": flat}, base=identify(original, "small"), capacity=ALL)


@pytest.fixture
def handle(original: Any, subspace: Subspace) -> Any:
    """The subspace on the pipeline, taken off again."""
    with attach(original, subspace) as attached:
        yield attached


def draw(pipeline: Any, seeds: list[int], steps: int = 2, guidance: float = 3.0, height: int = 16, **more: Any) -> Tensor:
    """The latents of a batch, one prompt and seed a sample."""
    count = len(seeds) // more.get("num_images_per_prompt", 1)
    return pipeline(
        ["a cat", "dog", "the big owl", "x"][:count],
        negative_prompt=["ugly", "", "z", "bad"][:count],
        height=height,
        width=16,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **more,
    ).images


def same(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    """Check that latents agree."""
    assert torch.isfinite(one).all()
    assert difference(one, other) < tolerance


# Each sample its own


def one_by_one(handle: Any, blends: list[str], **more: Any) -> Tensor:
    """The same batch drawn once with each blend, and the sample that belongs to it taken."""
    rows = []
    for index, blend in enumerate(blends):
        handle.set_blend(blend, masks=more.get("masks"))
        kept = {key: value for key, value in more.items() if key != "masks"}
        rows.append(draw(handle.pipeline, list(range(len(blends))), **kept)[index])
    return torch.stack(rows)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_batch_of_blends_is_what_one_by_one_is(handle: Any, guidance: float) -> None:
    expected = one_by_one(handle, BLENDS, guidance=guidance)
    assert [str(blend) for blend in handle.set_blends(BLENDS)] == [str(Blend.parse(text)) for text in BLENDS]
    same(draw(handle.pipeline, [0, 1, 2, 3], guidance=guidance), expected)
    handle.set_blend("ink")
    assert difference(expected[1:], draw(handle.pipeline, [0, 1, 2, 3], guidance=guidance)[1:]) > 0.05


def test_a_batch_may_differ_in_everything(handle: Any) -> None:
    masks = {"hat": torch.rand(9, 7, generator=torch.Generator().manual_seed(0))}
    blends = [
        "ink[steps=0..0.5] + neon[region=@hat]",
        "neon[blocks=down,text:0.5][steps=0.2..1 ramp=0.3]",
        "ink[region=left soft=0.2 during=0..0.6] + neon[region=top]",
        "ink + neon | ties density=0.3",
    ]
    expected = one_by_one(handle, blends, masks=masks, steps=4)
    handle.set_blends(blends, masks=masks)
    same(draw(handle.pipeline, [0, 1, 2, 3], steps=4), expected)


def test_several_pictures_of_a_prompt_share_its_blend(handle: Any) -> None:
    blends = BLENDS[:2]
    handle.set_blends(blends)
    together = draw(handle.pipeline, [0, 1, 2, 3], num_images_per_prompt=2)
    for index, blend in enumerate(blends):
        handle.set_blend(blend)
        alone = draw(handle.pipeline, [0, 1, 2, 3], num_images_per_prompt=2)
        same(together[2 * index : 2 * index + 2], alone[2 * index : 2 * index + 2])


@pytest.mark.parametrize(("before", "guidance", "each"), [(None, 3.0, 1), (3.0, 1.0, 2), (1.0, 3.0, 2)])
def test_a_pipeline_of_the_same_parts_gives_each_sample_its_blend(
    original: Any, subspace: Subspace, before: float | None, guidance: float, each: int
) -> None:
    """Whatever the attached pipeline was last called with, guidance is that of the pipeline which draws."""
    first = StableDiffusionPipeline(**original.components, requires_safety_checker=False)
    other = StableDiffusionPipeline(**original.components, requires_safety_checker=False)
    first.set_progress_bar_config(disable=True)
    other.set_progress_bar_config(disable=True)
    blends, seeds = BLENDS[:2], list(range(2 * each))
    with attach(first, subspace) as handle:
        if before:
            draw(first, [0], guidance=before)
        handle.set_blends(blends)
        together = draw(other, seeds, guidance=guidance, num_images_per_prompt=each)
        for index, blend in enumerate(blends):
            handle.set_blend(blend)
            part = slice(each * index, each * (index + 1))
            same(together[part], draw(other, seeds, guidance=guidance, num_images_per_prompt=each)[part])


def test_as_many_prompts_as_blends_are_needed(handle: Any) -> None:
    handle.set_blends(BLENDS)
    message = refusal(lambda: draw(handle.pipeline, [0]))
    assert "4 blends are set" in message
    assert "give 4 prompts" in message
    assert "for every sample" in refusal(lambda: handle.set_blends([]))


# Over the steps


def test_a_schedule_over_all_steps_is_none(handle: Any) -> None:
    handle.set_blend("ink:0.7 + neon:-0.2")
    plain = draw(handle.pipeline, [0, 1])
    handle.set_blend("ink:0.7[steps=0..1] + neon:-0.2")
    assert torch.equal(draw(handle.pipeline, [0, 1]), plain)


def test_schedules_that_share_out_the_steps_are_none(handle: Any) -> None:
    handle.set_blend("ink")
    plain = draw(handle.pipeline, [0], steps=5)
    handle.set_blend("ink[steps=0..0.37] + ink[steps=0.37..1]")
    same(draw(handle.pipeline, [0], steps=5), plain)


def test_a_pipeline_follows_a_schedule(original: Any) -> None:
    """As if the blend were set anew before every step; step i of n counts at (i + 1/2) / n."""
    lora = random_lora(original, 4, lambda path: path.startswith("unet"))
    subspace = Subspace.fit({"ink": lora}, base=identify(original), capacity=ALL)
    with attach(original, subspace) as handle:
        values = [0.0, 0.5, 1.0, 1.0]  # of steps at 1/8, 3/8, 5/8, 7/8 in a ramp from 1/8 to 5/8

        def after(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            handle.set_blend({"ink": 0.8 * (values + [0])[step + 1]})
            return tensors

        handle.set_blend({"ink": 0.0})
        expected = draw(original, [0], steps=4, callback_on_step_end=after)
        handle.set_blend("ink:0.8[steps=0.125..1 ramp=0.5,0]")
        assert torch.equal(draw(original, [0], steps=4), expected)
        assert torch.equal(draw(original, [0], steps=4), expected)  # and again, from the start


def test_a_schedule_that_is_over_leaves_the_base_to_the_last_bit(original: Any, handle: Any) -> None:
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    original.scheduler.set_timesteps(4)
    last = original.scheduler.timesteps[-1]
    handle.set_blend(None)
    plain = original.unet(sample, last, states).sample
    handle.set_blend("ink[steps=0..0.75]")
    assert torch.equal(original.unet(sample, last, states).sample, plain)
    assert not torch.equal(original.unet(sample, original.scheduler.timesteps[-2], states).sample, plain)


def test_a_text_encoder_takes_the_mean_over_the_steps(original: Any, handle: Any) -> None:
    ids = torch.tensor([[1, 5, 3]])
    handle.set_blend("ink:0.5")
    expected = original.text_encoder(ids)[0]
    handle.set_blend("ink[steps=0.25..0.75]")
    torch.testing.assert_close(original.text_encoder(ids)[0], expected)
    handle.set_blend("ink:2[region=left during=0..0.5 soft=0.1] + ink:-1")  # 2 * (1/4 + 1/2) - 1
    torch.testing.assert_close(original.text_encoder(ids)[0], expected, atol=1e-4, rtol=1e-3)


def test_other_schedulers_are_followed(original: Any, subspace: Subspace) -> None:
    from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

    for kind in (EulerDiscreteScheduler, HeunDiscreteScheduler):
        pipeline = copied(original)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        handle = attach(pipeline, subspace)
        handle.set_blend("ink[steps=0..1] + neon:0.5[steps=0..0.5] + neon:0.5[steps=0.5..1]")
        scheduled = draw(pipeline, [0], steps=3)
        handle.set_blend("ink + neon:0.5")
        same(scheduled, draw(pipeline, [0], steps=3))


# In block groups


def test_a_block_group_is_its_layers(original: Any, subspace: Subspace, handle: Any) -> None:
    handle.set_blend("ink:0.8[blocks=down.0,up:0.5]")
    attached = draw(handle.pipeline, [0])
    handle.detach()
    lora = subspace.lora("ink")
    scale = {"down_blocks.0": 0.8, "up_blocks": 0.4}
    part = {
        path: Factors(factor * entry.up, entry.down, entry.kernel)
        for path, entry in lora.layers.items()
        for start, factor in scale.items()
        if path.startswith(f"unet.{start}") or (start == "up_blocks" and path.startswith("unet.conv_out"))
    }
    expected = fused(original, Subspace.fit({"part": LoRA(part)}, capacity=ALL), {"part": 1.0})
    same(attached, draw(expected, [0]), 1e-4)


def test_block_groups_add_up(handle: Any) -> None:
    handle.set_blend("ink")
    whole = draw(handle.pipeline, [0])
    handle.set_blend("ink[blocks=down] + ink[blocks=mid,up] + ink[blocks=text]")
    same(draw(handle.pipeline, [0]), whole)
    handle.set_blend("ink[blocks=all,down.0:0.3] + ink:0.7[blocks=down.0]")
    same(draw(handle.pipeline, [0]), whole)


def test_what_is_not_there_is_refused_all_at_once(original: Any, handle: Any) -> None:
    handle.set_blend("ink")
    before = draw(original, [0])
    message = refusal(lambda: handle.set_blend("ink[blocks=early] + nothing + neon[region=@hat]"))
    for words in ("unknown concept 'nothing'", "block group early", "down.0", "no mask for @hat"):
        assert words in message
    assert "0 to 1" in refusal(lambda: handle.set_blend("ink[region=@hat]", masks={"hat": torch.full((3, 3), 2.0)}))
    assert str(handle.blend) == "ink:1"
    assert torch.equal(draw(original, [0]), before)


# In regions


@pytest.mark.parametrize("region", ["region=0,0,1,1", "region=0,0,1,1 soft=0.3", "region=@ones"])
def test_a_region_that_is_everything_is_none(handle: Any, region: str) -> None:
    handle.set_blend("ink + neon:0.5")
    plain = draw(handle.pipeline, [0, 1], height=24)
    handle.set_blend(f"ink[{region}] + neon:0.5", masks={"ones": torch.ones(5, 3)})
    same(draw(handle.pipeline, [0, 1], height=24), plain)


@pytest.mark.parametrize("soft", ["", " soft=0.25"])
def test_regions_that_share_out_the_picture_are_none(handle: Any, soft: str) -> None:
    handle.set_blend("ink")
    plain = draw(handle.pipeline, [0])
    handle.set_blend(f"ink[region=left{soft}] + ink[region=right{soft}]")
    same(draw(handle.pipeline, [0]), plain)
    handle.set_blend(f"ink[region=left{soft} during=0..0.5] + ink[region=right{soft} during=0..0.5][steps=0..0.5]")
    same(draw(handle.pipeline, [0]), plain, 2.0)  # draws, although the text side differs


def test_each_layer_sees_the_sum_of_masked_updates() -> None:
    """y(p) = W x(p) + beta sum_i m_i(p) C_i alpha.T x(p), written out for every place."""
    torch.manual_seed(0)
    mask = torch.rand(4, 6)
    columns = [[None, Blend.parse("a[region=left]").terms[0].region, Blend.parse("a[region=@m]").terms[0].region]]
    field = Field(columns, {"m": mask}, torch.tensor([[1.0, 0.5, 0.3]]))
    field.frame({24: (4, 6), 6: (2, 3)}, 5, None)
    left = torch.zeros(4, 6)
    left[:, :3] = 1
    weights = torch.stack([torch.ones(4, 6), left, mask], -1)
    linear, conv = nn.Linear(7, 9), nn.Conv2d(7, 9, 3, padding=1)
    for base, alpha in ((linear, torch.randn(7, 3)), (conv, torch.randn(63, 3))):
        cores, beta, layer = torch.randn(3, 3, 2), torch.randn(9, 2), (ShareLinear if base is linear else ShareConv)(base)
        layer.set([Update(alpha, (cores.flatten(0, 1),), beta, field)])
        if base is linear:
            inputs = torch.randn(2, 24, 7)
            hidden = inputs @ alpha
            expected = base(inputs) + torch.einsum("bpk,ckj,pc,oj->bpo", hidden, cores, weights.flatten(0, 1), beta)
        else:
            inputs = torch.randn(2, 7, 4, 6)
            hidden = nn.functional.conv2d(inputs, alpha.T.unflatten(1, (7, 3, 3)), padding=1)
            expected = base(inputs) + torch.einsum("bkhw,ckj,hwc,oj->bohw", hidden, cores, weights, beta)
        torch.testing.assert_close(layer(inputs), expected, atol=1e-4, rtol=1e-4)
    coarse = field.tokens(6, mask)[0].unflatten(0, (2, 3))
    torch.testing.assert_close(coarse[..., 2], mask.unflatten(0, (2, 2)).unflatten(2, (3, 2)).mean((1, 3)))
    joint = field.tokens(29, mask)[0]  # words in front
    torch.testing.assert_close(joint[:5], torch.tensor([1.0, 0.5, 0.3]).expand(5, 3))
    torch.testing.assert_close(joint[5:], weights.flatten(0, 1))
    assert "which is no grid of this picture" in refusal(lambda: field.tokens(23, mask))


def test_a_concept_stays_out_of_the_rest_of_the_picture(original: Any) -> None:
    """In a layer of the picture the other half is the base's to the last bit; words take the share of the picture."""
    loras = {"ink": random_lora(original, 5, lambda path: path in (TO_Q, TO_K))}
    with attach(original, Subspace.fit(loras, base=identify(original))) as handle:
        seen: dict[str, Tensor] = {}
        for name in (TO_Q, TO_K):
            layers(original)[name].register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
        inputs = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 7, 32)
        handle.set_blend(None)
        original.unet(*inputs)
        plain = dict(seen)
        handle.set_blend("ink:0.5")
        original.unet(*inputs)
        half = dict(seen)
        handle.set_blend("ink[region=left]")
        original.unet(*inputs)
        places = [seen[TO_Q].unflatten(1, (8, 8)), plain[TO_Q].unflatten(1, (8, 8))]
        assert torch.equal(places[0][:, :, 4:], places[1][:, :, 4:])
        assert not torch.isclose(places[0][:, :, :4], places[1][:, :, :4]).all(-1).any()
        torch.testing.assert_close(seen[TO_K], half[TO_K])


def test_the_transformers_of_sd3_and_flux_have_regions(original: Any) -> None:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(0)
    stable = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    places = torch.stack([torch.zeros(24), torch.arange(24) // 6, torch.arange(24) % 6], 1)
    words, pooled, time = torch.randn(2, 5, 16), torch.randn(2, 8), torch.tensor([500.0, 500.0])
    calls = {
        stable: {"hidden_states": torch.randn(2, 4, 8, 12), "timestep": time},
        flux: {
            "hidden_states": torch.randn(2, 24, 4),
            "timestep": time / 1000,
            "img_ids": places,
            "txt_ids": torch.zeros(5, 3),
        },
    }
    calls[flux]["txt_ids"] = torch.zeros(5, 3)
    for transformer, call in calls.items():
        call |= {"encoder_hidden_states": words, "pooled_projections": pooled}
        pipeline = SimpleNamespace(transformer=transformer.eval())
        with attach(pipeline, Subspace.fit({"ink": random_lora(pipeline, 1)}, capacity=ALL)) as handle, torch.no_grad():
            outputs = {}
            for blend in ("", "ink", "ink[region=0,0,1,1]", "ink[region=left] + ink[region=right]", "ink[region=left]"):
                handle.set_blend(blend)
                outputs[blend] = transformer(**call).sample
            same(outputs["ink[region=0,0,1,1]"], outputs["ink"])
            same(outputs["ink[region=left] + ink[region=right]"], outputs["ink"])
            assert difference(outputs["ink[region=left]"], outputs["ink"]) > 1e-3
            assert difference(outputs["ink[region=left]"], outputs[""]) > 1e-3
            handle.set_blends(["ink[region=left]", ""])
            both = transformer(**call).sample
            same(both[0], outputs["ink[region=left]"][0])
            same(both[1], outputs[""][1])
            handle.set_blend("ink[blocks=early] + ink[blocks=mid,late]")
            same(transformer(**call).sample, outputs["ink"])


# What it must agree with


def test_a_blend_is_what_pefts_adapters_add_up_to(original: Any, subspace: Subspace) -> None:
    weights = {"ink": 0.6, "neon": -0.4, "flat": 1.1}
    peft, ours = copied(original), copied(original)
    for name in weights:
        layers_of = subspace.lora(name).layers
        kept = {path: entry for path, entry in layers_of.items() if not path.endswith(("conv_in", "conv_out"))}
        peft.load_lora_weights(adapter_state(kept), adapter_name=name)
    peft.set_adapters(list(weights), adapter_weights=list(weights.values()))
    handle = attach(ours, subspace)
    handle.set_blend(" + ".join(f"{name}:{weight}" for name, weight in weights.items()))
    for path in ("unet.conv_in", "unet.conv_out"):
        handle.layers[path].set(())
    same(draw(ours, [0]), draw(peft, [0]), 1e-4)


def adapter_state(entries: dict[str, Factors]) -> dict[str, Tensor]:
    """The factors as peft's state of an adapter."""
    state = {}
    for path, entry in entries.items():
        up, down = entry.up, entry.down
        if entry.kernel:
            up, down = up[:, :, None, None], down.unflatten(1, (-1, *entry.kernel))
        state |= {f"{path}.lora_A.weight": down.contiguous(), f"{path}.lora_B.weight": up.contiguous()}
    return state


def dense(update: Update) -> Tensor:
    """What a shared update adds to a layer's weight, (out, in)."""
    assert update.middle == ()
    return update.beta @ update.alpha.mT


@pytest.mark.parametrize("narrow", [3, 4, 5])
def test_a_shared_blend_goes_through_few_columns(handle: Any, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("share_diffusion.active.NARROW", (narrow,))
    assert {name: handle.subspace[name].pseudo_rank for name in ("ink", "neon")} == {"ink": 2, "neon": 2}
    for blend, fits in (("ink", True), ("ink:0.5 + neon:-1", narrow >= 4), ("ink | ties", False)):
        handle.set_blend(blend)
        for path, layer in handle.layers.items():
            most = min(handle.subspace.layers[path].rank)
            for update in layer.updates:
                assert update.alpha.shape[1] == update.beta.shape[1] == (min(narrow, most) if fits else most)


@pytest.mark.parametrize("blend", ["ink[blocks=text]", "ink[blocks=mid]", "ink[blocks=mid region=left]"])
def test_no_layer_is_worked_on_that_nothing_acts_on(handle: Any, blend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("share_diffusion.active.NARROW", (2,))
    worked: list[int] = []
    monkeypatch.setattr(
        "share_diffusion.cores.spanned", lambda some, rank: worked.append(some.shape[-3]) or spanned(some, rank)
    )
    handle.set_blend(blend)
    assert sum(worked) == sum(bool(layer.updates) for layer in handle.layers.values()) > 0


@pytest.mark.parametrize("shape", [(3, 9, 5), (2, 5, 9), (1, 6, 6)])
@pytest.mark.parametrize("rank", [None, 2, 4, 5, 50])
def test_a_narrowed_core_is_the_core(shape: tuple[int, int, int], rank: int | None) -> None:
    cores = cores_of_rank(rank or 50, *shape)
    left, right = narrow(cores, rank)
    whole = [torch.eye(size, dtype=torch.float64).expand(shape[0], -1, -1) for size in shape[1:]]
    left, right = (whole[0] if left is None else left.double()), (whole[1] if right is None else right.double())
    torch.testing.assert_close((left @ right).float(), cores, atol=1e-6, rtol=1e-6)
    assert left.shape[2] == right.shape[1] == min(rank or 50, *shape[1:])


@pytest.mark.parametrize("rank", [None, 4, 8, 9])
def test_one_frame_serves_samples_and_regions(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("share_diffusion.cores.AT_ONCE", 400)  # two layers at once
    cores = torch.stack([cores_of_rank(2, 3, 9, 5, seed) for seed in range(4)]).unflatten(0, (2, 2))
    left, rest = frame(cores, rank)
    if rank is None or rank >= 9:
        assert left is None
        assert rest is cores
    else:
        assert left is not None
        assert left.shape == (3, 9, rank)
        within = rank >= 8  # four cores of rank 2
        error = (left @ rest - cores).norm() / cores.norm()
        assert error < 1e-6 if within else error > 0.1


def test_cores_without_columns_on_one_side_are_framed() -> None:
    left, rest = frame(torch.zeros(2, 1, 3, 20, 0), 16)
    assert left is not None
    assert (left.shape, rest.shape) == ((3, 20, 16), (2, 1, 3, 16, 0))


@pytest.mark.parametrize(
    ("blend", "rank"), [("ink[blocks=down,mid,up:0.5,text] + ink:0.1[steps=0..0.5]", 2), ("ink + neon[steps=0.5..1]", 4)]
)
def test_a_concept_counts_once_and_whenever_it_acts(
    handle: Any, blend: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("share_diffusion.active.NARROW", (2, 4, 100))
    handle.set_blend(blend)
    assert handle.active.rank == rank


def cores_of_rank(rank: int, layers: int, k: int, other: int, seed: int = 0) -> Tensor:
    """Random cores (layers, k, k'), that of the first layer zero."""
    generator, within = torch.Generator().manual_seed(seed), min(rank, k, other)
    cores = torch.randn(layers, k, within, generator=generator) @ torch.randn(layers, within, other, generator=generator)
    cores[0] = 0
    return cores


def test_what_is_active_is_linear_and_has_no_order(handle: Any) -> None:
    def updates(blend: str) -> dict[str, Tensor]:
        handle.set_blend(blend)
        return {path: dense(*layer.updates) for path, layer in handle.layers.items() if layer.updates}

    one, other, both = updates("ink:0.3"), updates("neon:-2"), updates("ink:0.3 + neon:-2")
    turned, doubled = updates("neon:-2 + ink:0.3"), updates("ink:0.6 + neon:-4")
    cores = handle.subspace.blend({"ink": 0.3, "neon": -2.0})
    for path, update in both.items():
        basis, tolerance = handle.subspace.layers[path], 1e-6 * float(update.norm())
        same_sum = (one[path] + other[path], turned[path], doubled[path] / 2, basis.beta @ cores[path] @ basis.alpha.mT)
        for expected in same_sum:
            torch.testing.assert_close(update, expected, atol=tolerance, rtol=1e-5)
    assert cores.keys() == both.keys()
    with_zero = updates("ink:0.3 + neon:0[region=left][steps=0..0.5] + flat:0[blocks=mid]")
    assert with_zero.keys() == one.keys()
    assert all(torch.equal(update, one[path]) for path, update in with_zero.items())


def test_every_layer_is_given_its_own_precision(original: Any, subspace: Subspace) -> None:
    mixed = copied(original)
    mixed.text_encoder.to(torch.bfloat16)
    handle = attach(mixed, subspace)
    for blends in (["ink"], ["ink[region=left]"], ["ink", "neon[region=top]"]):
        handle.set_blends(blends)
        for path, layer in handle.layers.items():
            wanted = torch.bfloat16 if path.startswith("text_encoder") else torch.float32
            for update in layer.updates:
                assert {update.alpha.dtype, update.beta.dtype, *(one.dtype for one in update.middle)} == {wanted}


@pytest.mark.slow
def test_half_precision_and_compilation_keep_working(original: Any, subspace: Subspace) -> None:
    blends = ["ink[region=left soft=0.1]", "neon:0.5[steps=0..0.6]"]
    with attach(original, subspace) as handle:
        handle.set_blends(blends)
        expected = draw(original, [0, 1])
    half = copied(original).to(torch.bfloat16)
    attach(half, subspace).set_blends(blends)
    assert difference(draw(half, [0, 1]), expected) < 0.15
    torch._dynamo.reset()
    compiled = copied(original)
    handle = attach(compiled, subspace)
    compiled.unet.forward = torch.compile(compiled.unet.forward, backend="eager")
    handle.set_blends(blends)
    same(draw(compiled, [0, 1]), expected)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["attach", "compile"])
def test_a_compiled_model_in_the_pipeline_keeps_schedules_and_regions(original: Any, subspace: Subspace, first: str) -> None:
    blends = ["ink[region=left soft=0.1]", "neon:0.5[steps=0..0.6]"]
    with attach(original, subspace) as handle:
        handle.set_blends(blends)
        expected = draw(original, [0, 1])
    torch._dynamo.reset()
    compiled = copied(original)
    handle = attach(compiled, subspace) if first == "attach" else None
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    handle = handle or attach(compiled, subspace)
    draw(compiled, [0, 1])
    handle.set_blends(blends)
    same(draw(compiled, [0, 1]), expected)
    handle.detach()
    torch._dynamo.reset()


class Packed(nn.Linear):
    """A linear layer that keeps its weight as bytes, as layers of 4 bits do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.whole = layer.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)
        if layer.bias is not None:
            self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.whole, self.bias)


def test_a_base_whose_weights_are_packed_draws_what_it_draws_otherwise(original: Any, subspace: Subspace) -> None:
    with attach(original, subspace) as handle:
        handle.set_blend("ink")
        expected = draw(original, [0])
    small = copied(original)
    handle = attach(small, subspace)
    handle.detach()
    for path, module in layers(small).items():
        if isinstance(module, nn.Linear) and path.startswith("unet") and path in subspace.layers:
            parent, attribute = parent_of(small, path)
            setattr(parent, attribute, Packed(module))
    handle = attach(small, subspace, strict=False)
    handle.set_blend("ink")
    same(draw(small, [0]), expected)


def test_words_get_the_mean_over_steps_and_picture_together(handle: Any) -> None:
    active = handle.set_blend("ink[steps=0..0.5][region=left during=0..0.5]") and handle.active
    assert sum(active.moment(None).weights[0][0]) == pytest.approx(0.25)  # half of the picture, half of the steps
    handle.set_blend("ink[steps=0..0.8 ramp=0.2][region=left during=0.1..0.9]")
    assert sum(handle.active.moment(None).weights[0][0]) == pytest.approx(0.6 - 0.5 * (0.6 - 0.025), abs=1e-9)


def test_blends_that_cannot_act_leave_those_that_do(original: Any, handle: Any, monkeypatch) -> None:
    handle.set_blend("ink")
    before = draw(original, [0])
    show = type(handle).show

    def full(self: Any, part: str, *more: Any) -> None:
        if part == "denoiser" and str(self.blend) != "ink:1":
            raise MemoryError
        show(self, part, *more)

    monkeypatch.setattr(type(handle), "show", full)
    with pytest.raises(MemoryError):
        handle.set_blend("neon")
    assert str(handle.blend) == "ink:1"
    assert torch.equal(draw(original, [0]), before)
    assert "give a list" in refusal(lambda: handle.set_blends("ink"))


def test_guidance_that_halves_the_prompts_is_told(handle: Any) -> None:
    handle.set_blends(["ink", "neon"])
    assert "give 2 prompts in one call" in refusal(lambda: order_of_samples(guided(True), 2, 2))
    assert order_of_samples(guided(True), 2, 4).tolist() == [0, 1, 0, 1]
    assert order_of_samples(guided(False), 2, 2).tolist() == [0, 1]


def guided(yes: bool) -> Any:
    """A pipeline that draws with guidance, or without."""
    return SimpleNamespace(_guidance_scale=5.0, do_classifier_free_guidance=yes)


def test_layers_come_back_to_where_they_were_taken_from(original: Any, subspace: Subspace) -> None:
    one, other = copied(original), copied(original)
    handle, mine = attach(one, subspace), one.unet
    one.unet = other.unet
    handle.detach()
    one.unet = mine
    assert not any(isinstance(module, ShareConv | ShareLinear) for module in layers(one).values())
    assert layers(other)[TO_Q] is not layers(one)[TO_Q]
