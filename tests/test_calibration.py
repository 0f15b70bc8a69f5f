"""Measuring a base: the directions that its layers use, against what plain linear algebra says."""

import math

import pytest
import torch
import torch.nn.functional as F

from share_diffusion import calibration
from share_diffusion.base import load_base
from share_diffusion.calibration import (
    LEAST,
    SHIPPED,
    STORED,
    Spectrum,
    Survey,
    calibrate,
    choose,
    measured,
    own_pictures,
    prompts,
    shipped,
)
from share_diffusion.learning import Frozen, denoising_loss
from share_diffusion.models.layers import select, shape_of
from share_diffusion.principal import POINT, patterns
from share_diffusion.step import draw_step
from share_diffusion.subspace import Origin, Subspace


@pytest.fixture(scope="module")
def tiny():
    return load_base("tiny")


@pytest.fixture(scope="module")
def pictures(tiny):
    with own_pictures(tiny, Survey(4)) as drawn:
        yield drawn


def spectrum(channels, kernel=POINT, size=None):
    start = torch.randn(channels, size or channels, generator=torch.Generator().manual_seed(1))
    return Spectrum(channels, kernel, start)


def values(*shape, seed=0):
    """Numbers whose channels (last) have very different energies and are mixed."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[-1]
    mixing = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(7)))[0]
    return torch.randn(*shape, generator=generator) * 0.7 ** torch.arange(channels) @ mixing


def measure(side, batches, conv=None):
    for _ in range(2):
        for batch in batches:
            side.see(batch, conv)
        side.turn()


def test_directions_and_energies_are_those_of_the_second_moment():
    batches = [values(3, 50, 12, seed=seed) for seed in range(4)]
    measure(side := spectrum(12), batches)
    rows = torch.cat(batches).reshape(-1, 12).double()
    wanted, vectors = torch.linalg.eigh(rows.mT @ rows)
    assert torch.allclose(side.energies[:, 0], wanted.flip(0), rtol=1e-4)
    assert torch.allclose((side.frame.mT @ vectors.flip(1)).abs().diagonal(), torch.ones(12, dtype=torch.float64), atol=1e-4)


def test_of_a_wide_side_the_strongest_directions_are_found():
    batches = [values(400, 40, seed=seed) for seed in range(3)]
    measure(side := spectrum(40, size=16), batches)
    rows = torch.cat(batches).double()
    wanted = torch.linalg.eigvalsh(rows.mT @ rows).flip(0)
    assert torch.allclose(side.energies[:6, 0], wanted[:6], rtol=0.02)
    assert (side.energies[:, 0] <= wanted[:16] * (1 + 1e-6)).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_pairs_of_a_convolution_have_the_energy_of_their_columns_in_its_unfolded_inputs(stride):
    conv = torch.nn.Conv2d(5, 4, 3, stride=stride, padding=1)
    batches = [values(2, 8, 8, 5, seed=seed).movedim(-1, 1) for seed in range(3)]
    measure(side := spectrum(5, (3, 3)), batches, conv)
    rows = torch.cat(
        [F.unfold(batch, 3, padding=1, stride=stride).movedim(1, -1).reshape(-1, 45) for batch in batches]
    ).double()
    waves = patterns((3, 3))
    for direction in range(5):
        for pattern in range(9):
            column = torch.outer(side.frame[:, direction], waves[:, pattern]).flatten()
            wanted = float((rows @ column).square().sum())
            assert math.isclose(float(side.energies[direction, pattern]), wanted, rel_tol=1e-3)


def sides(*energies):
    """Two sides of one layer that have been measured."""
    pair = []
    for entry in energies:
        side = spectrum(len(entry))
        side.frame, side.energies = (
            torch.eye(len(entry), dtype=torch.float64),
            torch.tensor(entry, dtype=torch.float64)[:, None],
        )
        pair.append(side)
    return tuple(pair)


def test_columns_go_where_the_energy_is():
    steep, flat = [1.0, *[1e-6] * 19], [1.0] * 20
    chosen = choose({"a": sides(steep, flat)}, rank=10, stored=100)
    assert chosen.widths("a") == (LEAST, 20 - LEAST)
    assert choose({"a": sides(flat, flat)}, rank=10, stored=100).widths("a") == (10, 10)


def test_no_more_is_stored_than_was_asked_for():
    flat = [1.0] * 20
    chosen = choose({"a": sides(flat, flat), "b": sides(flat, flat)}, rank=15, stored=6)
    assert sum(side.directions.numel() for pair in chosen.sides.values() for side in pair) <= 6 * 80
    assert sum(sum(chosen.widths(layer)) for layer in "ab") == 24


def test_a_side_that_the_loss_never_reaches_has_a_few_columns_all_the_same():
    side = spectrum(6)
    side.turn()
    side.turn()
    chosen = choose({"a": (side, side)}, rank=2)
    assert chosen.widths("a") == (LEAST, LEAST)
    columns = chosen.basis("a").alpha
    assert torch.allclose(columns.mT @ columns, torch.eye(LEAST), atol=1e-5)


def test_measuring_leaves_the_base_as_it_was_and_gives_the_same_twice(tiny, pictures):
    everything = select(tiny, "attention+ff+conv", True)
    modules = {path: module for path, module in everything.items() if "mid_block" in path or "text" in path}
    before = {path: module.weight.clone() for path, module in modules.items()}
    asked = [parameter.requires_grad for parameter in tiny.unet.parameters()]
    seen = []
    one = calibrate(tiny, modules, pictures, 8, Survey(draws=16), progress=lambda done, whole: seen.append((done, whole)))
    assert calibrate(tiny, modules, pictures, 8, Survey(draws=16)).digest == one.digest
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(torch.equal(before[path], module.weight) for path, module in modules.items())
    assert asked == [parameter.requires_grad for parameter in tiny.unet.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    assert all(parameter.grad is None for parameter in tiny.unet.parameters())
    assert set(one.sides) == set(modules)


def test_a_base_that_gives_nan_is_told_by_its_layer(pictures):
    broken = load_base("tiny")
    modules = {path: module for path, module in select(broken, "attention", False).items() if "mid_block" in path}
    broken.unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite in \d+ of \d+ layers, unet\.mid_block"):
        calibrate(broken, modules, pictures, 8, Survey(draws=8))
    assert not any(module._forward_hooks for module in modules.values())


def test_measured_columns_hold_more_of_inputs_and_gradients_than_columns_of_a_seed(tiny, pictures):
    """On other draws than those that were measured."""
    modules = {path: module for path, module in select(tiny, "attention+ff+conv", True).items() if "mid_block" in path}
    found = calibrate(tiny, modules, pictures, 24, Survey(draws=32))
    energies = {}

    def look(path, which, values, conv):
        if conv is not None and which == 0:
            values = F.unfold(values, conv.kernel_size, padding=conv.padding, stride=conv.stride)
        elif conv is not None:
            values = values.flatten(2)
        rows = values.mT if conv is not None else values
        rows = rows.reshape(-1, rows.shape[-1])
        (out, width), _ = shape_of(modules[path])
        for origin, basis in (("measured", found.basis(path)), ("seed", Origin("random", 999).derive(path, (out, width)))):
            columns = (basis.alpha, basis.beta)[which][:, : found.widths(path)[which]]
            part = (rows @ columns).square().sum() / rows.square().sum()
            energies.setdefault(origin, []).append(float(part))

    def watch(path, module):
        conv = module if isinstance(module, torch.nn.Conv2d) else None

        def before(_, given):
            look(path, 0, given[0].detach(), conv)
            return (given[0].detach().requires_grad_(),)

        def after(_, given, out):
            out.register_hook(lambda gradient: look(path, 1, gradient.detach(), conv))

        return module.register_forward_pre_hook(before), module.register_forward_hook(after)

    handles = [handle for path, module in modules.items() for handle in watch(path, module)]
    drawn = draw_step(tiny, pictures, 4, 5, 0)
    denoising_loss(Frozen(tiny), tiny, pictures, drawn, tiny.device).mean().backward()
    for handle in handles:
        handle.remove()
    mean = {origin: sum(parts) / len(parts) for origin, parts in energies.items()}
    assert mean["measured"] > 0.75
    assert mean["measured"] > mean["seed"] + 0.3


def test_the_embedded_base_comes_with_its_columns(tiny, monkeypatch):
    monkeypatch.setattr(calibration, "own_pictures", lambda *_: pytest.fail("it was measured again"))
    held, modules = Subspace.load(SHIPPED), select(tiny, "attention+ff+conv", True)
    assert not held.concepts
    assert set(held.layers) == set(modules)
    origin = measured(tiny, modules, Origin("activations", 48))
    assert origin == held.origin
    few = {path: module for path, module in modules.items() if "attn2" in path}
    assert set(measured(tiny, few, Origin("activations", 48)).principal.sides) == set(few)
    width = sum(sum(shape_of(module)[0]) for module in modules.values())
    stored = sum(side.directions.numel() for pair in origin.principal.sides.values() for side in pair)
    assert stored <= STORED * width
    assert sum(sum(origin.principal.widths(path)) for path in modules) <= 48 * 2 * len(modules)


def test_another_base_or_another_rank_is_measured_anew(tiny):
    modules = select(tiny, "attention", True)
    assert shipped(tiny, modules, Origin("activations", 48)) is not None
    assert shipped(tiny, modules, Origin("activations", 24)) is None
    assert shipped(tiny, modules, Origin("activations", 48, 1)) is None
    assert shipped(tiny, select(tiny, "all-linear", True), Origin("activations", 48)) is None
    other = load_base("tiny")
    for module in select(other, "attention", False).values():
        module.weight.data.mul_(1.5)
    assert shipped(other, modules, Origin("activations", 48)) is None


def test_the_base_is_asked_for_plain_things():
    assert len(set(prompts(64))) == 64
    assert prompts(70)[64:] == prompts(6)
    assert {word for prompt in prompts(8) for word in prompt.split()} >= {"cat", "house", "red"}
