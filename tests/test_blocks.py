"""Facts about where in a model a layer lies."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny_models import BUILDERS

from share_diffusion import file
from share_diffusion.capacity import Capacity
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.blocks import block_groups, blocks_of
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import layers, shape_of
from share_diffusion.subspace import BaseIdentity, Subspace

FLUX = [f"transformer.transformer_blocks.{number}.attn.to_q" for number in range(19)]
FLUX += [f"transformer.single_transformer_blocks.{number}.attn.to_q" for number in range(38)]


def test_a_transformer_is_thirds_of_its_blocks_and_each_has_its_number() -> None:
    blocks = blocks_of(FLUX)
    assert blocks == (19, 38)
    groups = block_groups(FLUX, blocks)
    assert [group for _, group, _ in groups.values()] == ["early"] * 19 + ["mid"] * 19 + ["late"] * 19
    assert groups[FLUX[20]] == ("all", "mid", "mid.20")


def test_a_block_is_the_same_whichever_others_are_adapted() -> None:
    whole = block_groups(FLUX, (19, 38))
    for some in (FLUX[26:40], FLUX[:3], [FLUX[56]]):
        assert block_groups(some, (19, 38)) == {path: whole[path] for path in some}


def test_a_file_tells_how_many_blocks_its_base_has(tmp_path) -> None:
    pipeline = BUILDERS["flux"]()
    base = identify(pipeline, "flux")
    assert base.blocks == blocks_of(layers(pipeline)) != ()
    path = next(path for path in layers(pipeline) if "single_transformer_blocks.0" in path and path.endswith("to_q"))
    out, width = shape_of(layers(pipeline)[path])[0]
    lora = LoRA({path: Factors(torch.randn(out, 2), torch.randn(2, width))})
    fitted = replace(Subspace.fit({"a": lora}, capacity=Capacity(retain=None)), base=base)
    fitted.save(tmp_path / "s")
    held = Subspace.load(tmp_path / "s")
    assert held.base == base
    assert block_groups(held.layers, held.base.blocks)[path] == block_groups(layers(pipeline))[path]
    # Before blocks were counted files had none, as those of a UNet have none today.
    assert "blocks" not in file.pack(replace(fitted, base=replace(base, blocks=())))[1]["base"]
    assert BaseIdentity.of({"name": "x", "architecture": "", "weights": [0.5]}) == BaseIdentity("x", "", (0.5,))
