"""Facts about merge methods: on cores they give what the same method gives on dense updates, or in the dense core basis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from share_diffusion.active import Active
from share_diffusion.blend import Blend
from share_diffusion.capacity import Capacity
from share_diffusion.cores import CoreTable
from share_diffusion.grammar import read_prompt
from share_diffusion.lora import Factors, LoRA
from share_diffusion.methods import dare, decorrelated, drop_out, equalise, linear, norm_equalised, ties, trim, tsv
from share_diffusion.models.blocks import block_groups
from share_diffusion.overlap import overlaps, report
from share_diffusion.subspace import Subspace

LAYERS = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (10, 9),
    "unet.down_blocks.1.attn1.to_q": (12, 11),
    "unet.up_blocks.0.attn1.to_q": (12, 11),
}
WEIGHTS = torch.tensor([1.0, -0.5, 0.8])


def draw(seed: int, scale: float = 1.0) -> LoRA:
    """A random LoRA of rank 2."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {path: ((out, 2), (2, width)) for path, (out, width) in LAYERS.items()}
    return LoRA(
        {path: Factors(*(scale * torch.randn(*size, generator=generator) for size in both)) for path, both in sizes.items()}
    )


@pytest.fixture(scope="module")
def subspace() -> Subspace:
    return Subspace.fit({"a": draw(0), "b": draw(1, 2.0), "c": draw(2, 0.5)}, capacity=Capacity(retain=None))


@pytest.fixture(scope="module")
def table(subspace: Subspace) -> CoreTable:
    return CoreTable(subspace, block_groups(subspace.layers, subspace.base.blocks))


def dense(subspace: Subspace, cores: dict[str, Tensor]) -> dict[str, Tensor]:
    """beta C alpha.T of transposed cores."""
    return {path: subspace.layers[path].beta @ core.T @ subspace.layers[path].alpha.T for path, core in cores.items()}


def merged(table: CoreTable, text: str) -> dict[str, Tensor]:
    """What a written blend makes of the cores."""
    active = Active([Blend.parse(text)], table, {})
    flat = active.flat(active.moment(0.0), 0, table.width)
    return {path: core[0, 0] for path, core in table.split(flat)}


def test_a_tag_with_two_weights_needs_no_adapted_text_encoder() -> None:
    path = "unet.down_blocks.1.attn1.to_q"
    lora = LoRA({path: draw(0).layers[path]})
    bare = Subspace.fit({"a": lora}, capacity=Capacity(retain=None))
    table = CoreTable(bare, block_groups(bare.layers, bare.base.blocks))
    expected = merged(table, "a:0.8")[path]
    for tag in ("<lora:a:0.8:0.8>", "<lora:a:0.3:0.8>"):
        blend = read_prompt(tag)[1]
        torch.testing.assert_close(merged(table, str(blend))[path], expected)
    with pytest.raises(ValueError, match="no adapted layer is in block group text"):
        merged(table, "a[blocks=text]")


def rows_of(table: CoreTable) -> Tensor:
    """All concepts' rows."""
    return torch.stack([table.row(name) for name in "abc"])


def test_a_row_holds_the_cores(subspace: Subspace, table: CoreTable) -> None:
    for name in "abc":
        cores = dict(table.split(table.row(name)))
        assert cores.keys() == LAYERS.keys()
        for path, entry in subspace.lora(name).layers.items():
            torch.testing.assert_close(dense(subspace, cores)[path], entry.dense(), atol=1e-5, rtol=1e-4)
    assert table.text == min(stack.start for stack in table.stacks if "unet" in stack.layers[0])


def test_tsv_on_cores_is_tsv_on_dense_updates(subspace: Subspace, table: CoreTable) -> None:
    ours = dense(subspace, merged(table, "a + b:-0.5 + c:0.8 | tsv"))
    for path in LAYERS:
        lefts, values, rights = [], [], []
        for name, weight in zip("abc", WEIGHTS, strict=True):
            left, value, right = torch.linalg.svd(subspace.lora(name).layers[path].dense())
            lefts.append(left[:, :2] * weight.sign())
            values.append(value[:2] * weight.abs())
            rights.append(right[:2].T)
        left, _, right = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
        outer, _, inner = torch.linalg.svd(torch.cat(rights, 1), full_matrices=False)
        expected = (left @ right) * torch.cat(values) @ (outer @ inner).T
        torch.testing.assert_close(ours[path], expected, atol=1e-4, rtol=1e-3)


def test_norm_equalised_on_cores_is_norm_equalised_on_dense_updates(subspace: Subspace, table: CoreTable) -> None:
    ours = dense(subspace, merged(table, "a + b:-0.5 + c:0.8 | norm-equalised"))
    loras = [subspace.lora(name).layers for name in "abc"]
    norms = [sum(float(entry.dense().square().sum()) for entry in lora.values()) ** 0.5 for lora in loras]
    for path in LAYERS:
        scaled = [lora[path].dense() * (sum(norms) / 3 / norm) for lora, norm in zip(loras, norms, strict=True)]
        torch.testing.assert_close(ours[path], sum(w * s for w, s in zip(WEIGHTS, scaled, strict=True)), atol=1e-4, rtol=1e-3)
    rows = equalise(rows_of(table))
    torch.testing.assert_close(rows.norm(dim=1), rows.norm(dim=1).mean().expand(3))


def test_ties_is_what_its_three_steps_say(table: CoreTable) -> None:
    """Entry by entry, in the basis of the cores: trim, elect, average those that agree."""
    rows, density = rows_of(table), 0.3
    kept = round(density * rows.shape[1])
    expected = torch.zeros(rows.shape[1])
    trimmed = rows.clone()
    for row in trimmed:
        row[row.abs().argsort(descending=True)[kept:]] = 0
    for entry in range(rows.shape[1]):
        values = WEIGHTS * trimmed[:, entry]
        agreeing = [float(value) for value in values if value != 0 and value.sign() == values.sum().sign()]
        expected[entry] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    torch.testing.assert_close(ties(rows, WEIGHTS, density), expected)
    flat = torch.cat([core.flatten() for core in merged(table, "a + b:-0.5 + c:0.8 | ties density=0.3").values()])
    torch.testing.assert_close(flat, expected)
    assert torch.equal(trim(rows, 1.0), rows)


def test_ties_leaves_one_concept_alone_and_takes_the_mean_of_equals(table: CoreTable) -> None:
    row = rows_of(table)[:1]
    torch.testing.assert_close(ties(row, torch.tensor([0.7]), 1.0), 0.7 * row[0])
    torch.testing.assert_close(ties(row.expand(3, -1), torch.ones(3), 1.0), row[0])


def test_dare_drops_and_keeps_the_mean() -> None:
    rows, drawn = torch.ones(2, 100_000), torch.rand(2, 100_000, generator=torch.Generator().manual_seed(1))
    dropped = drop_out(rows, 0.9, drawn)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 10.0]))
    torch.testing.assert_close(dropped.mean(1), torch.ones(2), atol=0.04, rtol=0)
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(dare(rows, torch.ones(2), 0.0, drawn), linear(rows, torch.ones(2)))


@pytest.mark.parametrize("method", ["ties density=0.3", "dare drop=0.5 seed=3"])
def test_a_blend_is_the_same_in_a_file_that_has_grown(subspace: Subspace, table: CoreTable, method: str) -> None:
    grown = subspace.merge({"later": draw(7)}, capacity=Capacity(retain=None))
    wide = CoreTable(grown, block_groups(grown.layers))
    assert wide.width > table.width
    before, after = (dense(one.subspace, merged(one, f"a + b:-0.5 | {method}")) for one in (table, wide))
    for path, update in before.items():
        torch.testing.assert_close(after[path], update, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", ["unet", "text_encoder"])
def test_tsv_needs_no_layers_of_the_other_part(kept: str) -> None:
    loras = {name: LoRA({p: e for p, e in draw(seed).layers.items() if p.startswith(kept)}) for seed, name in enumerate("ab")}
    bare = Subspace.fit(loras, capacity=Capacity(retain=None))
    table = CoreTable(bare, block_groups(bare.layers))
    active = Active([Blend.parse("a + b | tsv")], table, {})
    for start, stop in ((0, table.text), (table.text, table.width)):
        assert active.flat(active.moment(0.0), start, stop).shape == (1, 1, stop - start)


@pytest.mark.parametrize("method", ["ties density=0.4", "dare drop=0.3 seed=5", "tsv", "norm-equalised"])
def test_the_order_of_concepts_and_absent_ones_do_not_matter(table: CoreTable, method: str) -> None:
    expected = merged(table, f"a + b:-0.5 | {method}")
    for text in (f"b:-0.5 + a | {method}", f"a + c:0 + b:-0.5 | {method}"):
        for path, core in merged(table, text).items():
            torch.testing.assert_close(core, expected[path], atol=1e-5, rtol=1e-4)
    other = merged(table, f"a + b:-0.5 + c | {method}")
    assert any(not torch.allclose(core, expected[path]) for path, core in other.items())


def test_one_concept_is_itself_in_every_basis_free_method(table: CoreTable) -> None:
    alone = merged(table, "b:0.7")
    for method in ("tsv", "norm-equalised"):
        for path, core in merged(table, f"b:0.7 | {method}").items():
            torch.testing.assert_close(core, alone[path], atol=1e-5, rtol=1e-4)


def test_tsv_takes_equal_concepts_once() -> None:
    core = torch.randn(1, 2, 6, 2) @ torch.randn(1, 2, 2, 6)
    torch.testing.assert_close(tsv(core.expand(2, -1, -1, -1), torch.ones(2)), core[0], atol=1e-4, rtol=1e-3)
    frame = decorrelated(torch.randn(7, 3))
    torch.testing.assert_close(frame.T @ frame, torch.eye(3), atol=1e-5, rtol=1e-5)
    rows = torch.randn(3, 50)
    torch.testing.assert_close(norm_equalised(rows, WEIGHTS), linear(equalise(rows), WEIGHTS))


# Overlap


def test_overlap_is_the_cosine_of_the_dense_updates(subspace: Subspace) -> None:
    pairs = {(pair.one, pair.other): pair for pair in overlaps(subspace)}
    assert [pair.cosine for pair in pairs.values()] == sorted((pair.cosine for pair in pairs.values()), reverse=True)
    for (one, other), pair in pairs.items():
        ours, theirs = subspace.lora(one).layers, subspace.lora(other).layers
        groups = {"text": "text_encoder", "down": "unet.down", "up": "unet.up"}
        for group, start in [*groups.items(), ("whole", "")]:
            flat = [torch.cat([e.dense().flatten() for p, e in lora.items() if p.startswith(start)]) for lora in (ours, theirs)]
            expected = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
            assert (pair.cosine if group == "whole" else pair.groups[group]) == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(
        subspace.overlap()[0, 1], torch.tensor(pairs["a", "b"].cosine, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_the_report_says_what_to_expect(subspace: Subspace) -> None:
    near = {path: Factors(entry.up + 0.1, entry.down) for path, entry in draw(0).layers.items()}
    subspace = subspace.merge({"near": LoRA(near)}, capacity=Capacity(retain=None))
    pairs = overlaps(subspace, ["near", "a", "b"])
    assert (pairs[0].one, pairs[0].other) == ("near", "a")
    assert str(pairs[0]).startswith(f"near and a overlap {100 * pairs[0].cosine:.0f} % (down ")
    assert "expect bleed; give each its own region" in report(pairs)
    assert "overlaps with nothing" in report(overlaps(subspace, ["a"]))
    with pytest.raises(ValueError, match="unknown concept 'x'"):
        overlaps(subspace, ["x"])
