"""Facts about learning elsewhere: a patch says what its LoRA said, and many of them make one file in whatever order."""

import itertools

import pytest
import torch
from drawn_columns import draw_principal

from share_diffusion.__main__ import main
from share_diffusion.asynchronous import merge_files, merge_patches
from share_diffusion.capacity import Capacity
from share_diffusion.file import load
from share_diffusion.lora import Factors, LoRA
from share_diffusion.patch import is_patch, make_patch, read_patch, write_patch
from share_diffusion.subspace import BaseIdentity, Origin, Subspace

SHAPES = {"text_encoder.c": (12, 10, None), "unet.a": (20, 12, None), "unet.b": (10, 18, (3, 3))}
TOLERANCE = 2e-3  # of half precision


def draw(seed, rank=2, shapes=SHAPES, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer, (out, width, kernel) in shapes.items():
        up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
        layers[layer] = Factors(scale * up, down, kernel)
    return LoRA(layers, {})


def gap(one, two):
    """Relative error of one LoRA against another, all layers together."""
    error = sum(float((one.layers[layer].dense() - two.layers[layer].dense()).square().sum()) for layer in two.layers)
    return error**0.5 / two.norm


def started(tmp_path, **options):
    """A saved subspace of one concept, as a worker would find it."""
    path = tmp_path / "mine.safetensors"
    Subspace.fit({"first": draw(1)}, base=BaseIdentity("b", "x", (1.0,)), **options).save(path)
    return path, load(path)


def written(tmp_path, subspace, names, start=10):
    paths = []
    for number, name in enumerate(names):
        paths.append(tmp_path / f"{name}.patch.safetensors")
        write_patch(make_patch(subspace, name, draw(start + number), kind="subject", trigger=name), paths[-1])
    return paths


MEASURED = draw_principal({layer: shape[:2] for layer, shape in SHAPES.items()}, {"unet.b": (3, 3)})


@pytest.mark.parametrize("origin", [Origin(), Origin("random", 3, 5), Origin("activations", 3, principal=MEASURED)])
def test_a_patch_says_what_the_lora_said_and_costs_nothing_for_what_is_known(tmp_path, origin):
    empty = Subspace(origin=origin)
    held = empty.merge({"first": draw(1)})
    lora = draw(2, scale=40.0)
    write_patch(make_patch(held, "new", lora), tmp_path / "new.safetensors")
    again = read_patch(tmp_path / "new.safetensors")
    assert gap(again.lora(held), lora) < TOLERANCE
    inside = make_patch(held, "same", held.lora("first"))
    assert all(basis.rank == (0, 0) for basis in inside.extension.values())
    assert gap(inside.lora(held), held.lora("first")) < 1e-5


def test_a_merged_patch_is_the_concept_learned_in_place(tmp_path):
    _, held = started(tmp_path)
    lora = draw(2)
    here = held.merge({"new": lora})
    there = merge_patches(held, [make_patch(held, "new", lora)])
    assert gap(there.lora("new"), here.lora("new")) < 1e-5
    assert torch.equal(there["first"].coefficients["unet.a"].alpha, held["first"].coefficients["unet.a"].alpha)
    assert there.layers["unet.a"].rank == here.layers["unet.a"].rank


def test_patches_in_measured_columns_are_folded_into_the_file_that_holds_them_and_into_no_other(tmp_path):
    path, measured = tmp_path / "mine.safetensors", Origin("activations", 3, principal=MEASURED)
    held = Subspace(origin=measured).cover({layer: (shape[:2], shape[2]) for layer, shape in SHAPES.items()}).save(path)
    alone = written(tmp_path, held, ["a"])
    grown = held.merge({"first": draw(1)}).save(path)
    merged = merge_files(path, [*alone, *written(tmp_path, grown, ["b"], start=20)])
    assert set(merged.concepts) == {"first", "a", "b"}
    assert gap(load(path).lora("a"), draw(10)) < 0.02  # of 8 bits
    with pytest.raises(ValueError, match="copy of the file that was learned against"):
        merge_files(tmp_path / "absent.safetensors", alone)
    other = draw_principal({layer: shape[:2] for layer, shape in SHAPES.items() if layer != "unet.a"}, {"unet.b": (3, 3)})
    strange = Subspace(origin=Origin("activations", 3, principal=other))
    strange.cover({layer: (shape[:2], shape[2]) for layer, shape in SHAPES.items()}).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="learned against basis version"):
        merge_files(tmp_path / "other.safetensors", alone)


def test_every_order_and_repetition_gives_the_same_bytes(tmp_path):
    path, held = started(tmp_path)
    paths = written(tmp_path, held, ["a", "b", "c"])
    before, results = path.read_bytes(), set()
    for number, order in enumerate([*itertools.permutations(paths), [*paths, paths[0]]]):
        copy = tmp_path / f"copy{number}.safetensors"
        copy.write_bytes(before)
        merge_files(copy, order)
        results.add(copy.read_bytes())
    assert len(results) == 1
    assert list(load(tmp_path / "copy0.safetensors").concepts) == ["first", "a", "b", "c"]


def test_a_second_delivery_changes_nothing(tmp_path):
    path, held = started(tmp_path)
    paths = written(tmp_path, held, ["a", "b"])
    merge_files(path, paths[:1])
    merge_files(path, paths)
    after = path.read_bytes()
    merge_files(path, paths)
    assert path.read_bytes() == after
    assert list(load(path).concepts) == ["first", "a", "b"]


def test_a_patch_stays_valid_while_the_file_grows(tmp_path):
    path, held = started(tmp_path)
    early = written(tmp_path, held, ["early"])[0]
    Subspace.load(path).merge({"second": draw(2), "third": draw(3)}).save(path)
    merged = merge_files(path, [early])
    assert gap(merged.lora("early"), draw(10)) < 0.04  # retain 0.999 of the energy
    assert merged["early"].retention > 0.998


def test_a_patch_against_rotated_columns_is_re_expressed_or_refused(tmp_path):
    path, held = started(tmp_path)
    early = written(tmp_path, held, ["early"])[0]
    original = tmp_path / "original.safetensors"
    original.write_bytes(path.read_bytes())
    for name, seed in (("second", 2), ("third", 3)):  # twice, so that the backup is rotated as well
        load(path).merge({name: draw(seed)}, capacity=Capacity(retain=None, rank=2)).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"'early': learned against basis version .* rotated.*--against"):
        merge_files(path, [early])
    assert path.read_bytes() == before
    merged = merge_files(path, [early], capacity=Capacity(retain=None), against=[original])
    assert gap(merged.lora("early"), draw(10)) < TOLERANCE


def test_the_backup_is_looked_at_by_itself(tmp_path):
    path, held = started(tmp_path)
    early = written(tmp_path, held, ["early"])[0]
    load(path).merge({"second": draw(2)}, capacity=Capacity(retain=None, rank=2)).save(path)
    assert gap(merge_files(path, [early], capacity=Capacity(retain=None)).lora("early"), draw(10)) < TOLERANCE


def test_patches_learned_from_nothing_make_a_file(tmp_path):
    paths = written(tmp_path, Subspace(base=BaseIdentity("b", "x", (1.0,))), ["a", "b"])
    merged = merge_files(tmp_path / "new.safetensors", paths)
    assert merged.base.name == "b"
    assert gap(load(tmp_path / "new.safetensors").lora("b"), draw(11)) < 0.04


def test_problems_are_told_together_and_nothing_is_written(tmp_path):
    path, held = started(tmp_path)
    good, twin = written(tmp_path, held, ["a"])[0], tmp_path / "twin.safetensors"
    write_patch(make_patch(held, "A", draw(50)), twin)
    other, taken = tmp_path / "other.safetensors", tmp_path / "taken.safetensors"
    foreign = Subspace(base=BaseIdentity("c", "y", (2.0,)))
    write_patch(make_patch(foreign, "z", draw(51)), other)
    write_patch(make_patch(Subspace(base=held.base), "first", draw(52)), taken)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="named 'a'") as error:
        merge_files(path, [good, twin, other, taken])
    assert "another architecture" in str(error.value)
    assert "'first': another concept" in str(error.value)
    assert path.read_bytes() == before


def test_the_command_folds_patches_in(tmp_path, capsys):
    path, held = started(tmp_path)
    patches = [str(one) for one in written(tmp_path, held, ["a", "b"])]
    before = path.read_bytes()
    assert main(["merge", str(path), *patches, "--dry_run"]) == 0
    assert path.read_bytes() == before
    assert main(["merge", str(path), *reversed(patches)]) == 0
    assert "3 concepts" in capsys.readouterr().out
    assert list(load(path).concepts) == ["first", "a", "b"]
    assert main(["merge", str(path), patches[0], "some.safetensors"]) == 1
    assert "leave out some.safetensors" in capsys.readouterr().err
    words = ["--kind", "subject", "--trigger", "sks", "--pseudo_rank", "2"]
    assert main(["merge", str(path), patches[0], *words]) == 1
    assert "leave out --kind, --trigger, --pseudo_rank" in capsys.readouterr().err


def test_a_patch_knows_itself(tmp_path):
    path, held = started(tmp_path)
    patch = written(tmp_path, held, ["a"])[0]
    assert is_patch(patch)
    assert not is_patch(path)
    with pytest.raises(ValueError, match="is not a patch: it holds a subspace"):
        read_patch(path)
    with pytest.raises(ValueError, match="exists already"):
        write_patch(read_patch(patch), patch)
    made = make_patch(held, "b", draw(3), details={"prompts": ["x"]})
    write_patch(made, tmp_path / "b.safetensors")
    assert read_patch(tmp_path / "b.safetensors").digest == made.digest
