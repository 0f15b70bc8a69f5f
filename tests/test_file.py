"""Facts about the one file: what lies where, that reading gives back what was written, and what is refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from share_diffusion import file, storage
from share_diffusion.basis import Basis, Coefficients
from share_diffusion.capacity import Capacity
from share_diffusion.concept import Concept
from share_diffusion.lora import Factors, LoRA
from share_diffusion.storage import ConflictError, StorageError
from share_diffusion.subspace import BaseIdentity, Origin, Subspace

SHAPES = {"unet.b": (10, 18, (3, 3)), "unet.a": (20, 12, None), "text_encoder.c": (8, 6, None)}
ALL = Capacity(retain=None)
HALF = 2e-3  # relative error of an update whose factors were rounded to float16
WHOLE = 2e-2  # of one whose coefficients were rounded to 8 bits


def draw(seed: int, layers: tuple[str, ...] = tuple(SHAPES), rank: int = 2, scale: float = 1.0) -> LoRA:
    """A random LoRA."""
    generator = torch.Generator().manual_seed(seed)

    def pair(out: int, width: int, kernel: tuple[int, int] | None) -> Factors:
        up = scale * torch.randn(out, rank, generator=generator, dtype=torch.float64)
        return Factors(up, torch.randn(rank, width, generator=generator, dtype=torch.float64), kernel)

    return LoRA({layer: pair(*SHAPES[layer]) for layer in layers})


def trained() -> Subspace:
    """Three concepts, of which the second misses a layer and the third has widened two bases."""
    base = BaseIdentity("small-base", "0123456789abcdef", (0.5, -0.25))
    subspace = Subspace.fit({"ink": draw(0)}, base=base, capacity=ALL)
    about = {"Ünïcode cat": {"kind": "subject", "trigger": "a sks cat", "details": {"steps": 300, "prompts": ["a", "ß"]}}}
    subspace = subspace.merge({"Ünïcode cat": draw(1, ("unet.a", "unet.b"), rank=3)}, capacity=ALL, about=about)
    return subspace.merge({"neon": draw(2)}, capacity=Capacity(retain=0.9))


def body(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor."""
    return {name: tensor.numpy().tobytes() for name, tensor in storage.read(path)[1].items()}


def close(one: LoRA, other: LoRA, error: float = HALF) -> bool:
    """Whether two LoRAs are the same updates up to the rounding of a file."""
    lost = sum(
        float(
            (entry.up.double() @ entry.down.double() - other.layers[layer].up.double() @ other.layers[layer].down.double())
            .square()
            .sum()
        )
        for layer, entry in one.layers.items()
    )
    return one.layers.keys() == other.layers.keys() and math.sqrt(lost) <= error * one.norm


def refusal(action: Callable[[], object]) -> str:
    """The message of the ValueError that an action must raise."""
    with pytest.raises(ValueError) as caught:
        action()
    return str(caught.value)


# Round trip


def test_a_loaded_subspace_is_the_saved_one(tmp_path: Path) -> None:
    subspace = trained().save(tmp_path / "s.safetensors")
    again = Subspace.load(tmp_path / "s.safetensors")
    assert (again.base, again.origin, again.kernels) == (subspace.base, subspace.origin, subspace.kernels)
    assert (again.generation, again.complete, again.basis_version) == (1, True, subspace.basis_version)
    assert list(again.concepts) == ["ink", "Ünïcode cat", "neon"]
    for name, concept in subspace.concepts.items():
        found = again[name]
        assert (found.kind, found.trigger, found.details) == (concept.kind, concept.trigger, concept.details)
        assert found.norm == pytest.approx(concept.norm, rel=1e-5)
        assert concept.retention - 1e-6 < found.retention <= concept.retention + 1e-9
        assert close(subspace.lora(name), again.lora(name))
        assert found.coefficients.keys() == concept.coefficients.keys()
        assert subspace.lora(name).layers["unet.b"].kernel == (3, 3)


def test_saving_what_was_loaded_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    trained().save(first)
    Subspace.load(first).save(second, replace=True)
    assert body(first) == body(second)
    assert storage.read_header(first).metadata == storage.read_header(second).metadata
    assert first.read_bytes() == second.read_bytes()


def test_the_same_concepts_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_retention_does_not_sink_from_save_to_save(tmp_path: Path) -> None:
    """And is never rounded up."""
    path, subspace = tmp_path / "s", trained()
    for retention in (0.0002495, 0.5242875, 0.9199999999, 0.9999996, 1.0):
        told = replace(subspace, concepts={"ink": replace(subspace["ink"], retention=retention)})
        told.save(path, replace=True)
        once = Subspace.load(path)
        once.save(path, replace=True)
        assert Subspace.load(path)["ink"].retention == once["ink"].retention
        assert retention - 1e-6 < once["ink"].retention <= retention + 1e-9


def test_merges_go_on_where_the_file_left_off(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    trained().save(path)
    before = Subspace.load(path)
    before.merge({"new": draw(3)}).save(path)
    after = Subspace.load(path)
    assert (before.generation, after.generation) == (1, 2)
    for name, concept in before.concepts.items():
        assert concept.retention == after[name].retention
        for layer, entry in concept.coefficients.items():
            assert torch.equal(entry.alpha, after[name].coefficients[layer].alpha)
            assert torch.equal(entry.beta, after[name].coefficients[layer].beta)
    assert close(draw(3), after.lora("new")) or after["new"].retention < 1


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e-6, 1e6])
def test_a_concept_of_any_scale_survives(tmp_path: Path, scale: float) -> None:
    """Half precision has no number between 0 and 6e-8: coefficients must not become zero while the retention says 1."""
    lora = draw(0, scale=scale)
    Subspace.fit({"a": lora}, capacity=ALL).save(tmp_path / "s")
    again = Subspace.load(tmp_path / "s")
    assert again["a"].norm == pytest.approx(lora.norm, rel=1e-5)
    assert close(lora, again.lora("a"))


def test_layers_of_zeros_and_layers_that_nobody_uses(tmp_path: Path) -> None:
    """Real files have layers of zeros; a drop takes the layers that nobody uses along, and a merge brings them back."""
    lora = draw(0)
    silent = lora.layers["unet.a"]
    zero = LoRA(lora.layers | {"unet.a": Factors(0 * silent.up, silent.down)})
    subspace = Subspace.fit({"zero": zero})
    subspace.save(tmp_path / "s")
    assert Subspace.load(tmp_path / "s").layers["unet.a"].rank == (0, 0)
    subspace.drop("zero").save(tmp_path / "e")
    empty = Subspace.load(tmp_path / "e")
    assert (len(empty.concepts), len(empty.layers)) == (0, 0)
    assert close(lora, empty.merge({"a": lora}, capacity=ALL).lora("a"))


def test_an_empty_subspace_is_a_file_too(tmp_path: Path) -> None:
    Subspace().save(tmp_path / "s")
    assert Subspace.load(tmp_path / "s").concepts == {}


def test_rows_that_a_concept_does_not_have_are_zero(tmp_path: Path) -> None:
    """The first concept's layer grew afterwards: it keeps its own rows, in the file and after it."""
    subspace = trained()
    subspace.save(tmp_path / "s")
    again = Subspace.load(tmp_path / "s")
    entry = again["ink"].coefficients["unet.a"]
    assert (entry.alpha.shape, entry.beta.shape) == ((2, 2), (2, 2))
    assert again.layers["unet.a"].rank > (2, 2)
    core = again.blend({"ink": 1.0})["unet.a"]
    assert core.shape == tuple(reversed(again.layers["unet.a"].rank))
    assert (core[2:] == 0).all()
    assert (core[:, 2:] == 0).all()


# What lies where


def test_the_file_is_what_its_description_says(tmp_path: Path) -> None:
    """Read with safetensors alone."""
    path, subspace = tmp_path / "s.safetensors", trained()
    subspace.save(path)
    with safe_open(path, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        envelope = json.loads(opened.metadata()["share"])
    content = envelope["content"]
    assert (envelope["format"], envelope["format_version"], envelope["generation"]) == ("share-subspace", 1, 1)
    assert content.keys() == {"base", "origin", "basis_version", "layers", "concepts"}
    assert content["base"] == {"name": "small-base", "architecture": "0123456789abcdef", "weights": [0.5, -0.25]}
    assert content["origin"] == {"kind": "adapters", "rank": 0, "seed": 0}
    assert content["layers"] == [["text_encoder.c", 8, 6, None], ["unet.a", 20, 12, None], ["unet.b", 10, 18, [3, 3]]]
    assert [entry["layout"] for entry in content["concepts"]] == [0, 1, 2]
    assert content["concepts"][1] | {"norm": 0} == {
        "name": "Ünïcode cat",
        "kind": "subject",
        "trigger": "a sks cat",
        "norm": 0,
        "retention": 1.0,
        "layout": 1,
    }
    sides = [f"{layer}.share_{side}" for layer in SHAPES for side in ("alpha", "beta")]
    assert sorted(tensors) == sorted([*sides, "concept.00000", "concept.00001", "concept.00002", "layouts", "details"])
    for layer, (out, width, _) in SHAPES.items():
        alpha, beta = tensors[f"{layer}.share_alpha"], tensors[f"{layer}.share_beta"]
        assert (alpha.dtype, len(alpha), len(beta)) == (torch.float16, width, out)
        assert torch.equal(alpha, subspace.layers[layer].alpha.half())
        assert torch.equal(beta, subspace.layers[layer].beta.half())
    assert json.loads(bytes(tensors["details"].tolist())) == [{}, {"steps": 300, "prompts": ["a", "ß"]}, {}]
    assert (tensors["layouts"].dtype, tensors["layouts"].shape) == (torch.int32, (3, 3, 3))
    assert tensors["layouts"][0].tolist() == [[2, 2, 2]] * 3
    assert tensors["layouts"][1].tolist() == [[0, 0, 0], [5, 5, 3], [5, 5, 3]]


def test_a_concept_can_be_rebuilt_from_the_raw_tensors(tmp_path: Path) -> None:
    """Layer by layer, alpha before beta, row by row; up to one scale, which is the concept's norm."""
    subspace = trained()
    subspace.save(tmp_path / "s")
    metadata, tensors, _ = storage.read(tmp_path / "s")
    packed, expected = tensors["concept.00001"].double(), subspace.lora("Ünïcode cat")
    updates, start = {}, 0
    for (layer, *_), (alpha, beta, rank) in zip(metadata["layers"], tensors["layouts"][1].tolist(), strict=True):
        first, second = start + alpha * rank, start + (alpha + beta) * rank
        one, other = packed[start:first].reshape(alpha, rank), packed[first:second].reshape(beta, rank)
        frames = [tensors[f"{layer}.share_{side}"][:, :rows].double() for side, rows in (("alpha", alpha), ("beta", beta))]
        updates[layer], start = frames[1] @ other @ one.T @ frames[0].T, second
    assert start == packed.numel()
    total = math.sqrt(sum(float(update.square().sum()) for update in updates.values()))
    for layer, entry in expected.layers.items():
        torch.testing.assert_close(updates[layer] / total, (entry.up @ entry.down).double() / expected.norm, atol=1e-3, rtol=0)


def test_concepts_of_one_layout_share_it(tmp_path: Path) -> None:
    loras = {f"c{i}": draw(i) for i in range(3)} | {"other": draw(3, ("unet.a",))}
    subspace = Subspace.fit(loras, capacity=ALL)
    tensors, metadata = file.pack(subspace)
    assert tensors["layouts"].shape == (2, 3, 3)
    assert [entry["layout"] for entry in metadata["concepts"]] == [0, 0, 0, 1]
    subspace.save(tmp_path / "s")
    assert all(close(lora, Subspace.load(tmp_path / "s").lora(name)) for name, lora in loras.items())


@pytest.mark.parametrize("kind", ["random", "weights"])
def test_derived_columns_are_not_in_the_file(tmp_path: Path, kind: str) -> None:
    weights = {layer: torch.randn(out, width) for layer, (out, width, _) in SHAPES.items()}
    subspace = Subspace.fit({"a": draw(0)}, basis=kind, derived_rank=4, weights=weights, capacity=ALL)
    subspace.save(tmp_path / "s")
    tensors = storage.read(tmp_path / "s")[1]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if "share_" in name} == {
        f"{layer}.share_{side}": (size, 2)
        for layer, (out, width, _) in SHAPES.items()
        for side, size in (("alpha", width), ("beta", out))
    }
    assert close(draw(0), Subspace.load(tmp_path / "s", weights).lora("a"), WHOLE)


def test_the_bytes_of_a_further_concept_are_its_coefficients(tmp_path: Path) -> None:
    """The bases are paid for once: what a concept adds is 2 bytes a coefficient and a line in the header."""
    span = draw(0)
    inside = LoRA({layer: Factors(entry.up.flip(1), entry.down, entry.kernel) for layer, entry in span.layers.items()})
    one = Subspace.fit({"a": span}, capacity=ALL)
    two = one.merge({"b": inside}, capacity=ALL)
    for name, subspace in (("one", one), ("two", two)):
        subspace.save(tmp_path / name)
    assert two["b"].numbers == 3 * (2 + 2) * 2
    extra = (tmp_path / "two").stat().st_size - (tmp_path / "one").stat().st_size
    assert 2 * two["b"].numbers <= extra < 2 * two["b"].numbers + 300


# Metadata


def test_metadata_of_a_later_version_survives(tmp_path: Path) -> None:
    path, later = tmp_path / "s", {"colour": [1, {"deep": None}], "z": "ß"}
    tensors, metadata = file.pack(trained())
    storage.write(path, tensors, {**metadata, **later}, expected_generation=None)
    subspace = Subspace.load(path)
    assert subspace.extra == later
    subspace.drop("ink").save(path)
    assert storage.read_header(path).metadata.items() >= later.items()


def many(count: int) -> Subspace:
    """So many concepts of one coefficient each."""
    one = torch.ones(1, 1)
    basis = {"unet.a": Basis(torch.eye(8)[:, :1], torch.eye(8)[:, :1])}
    names = [f"concept number {i}" for i in range(count)]
    return Subspace(
        layers=basis,
        concepts={name: Concept(name, {"unet.a": Coefficients(one, one)}, 1.0, trigger="in a style") for name in names},
    )


def test_ten_thousand_concepts_are_listed_from_the_header_within_a_second(tmp_path: Path) -> None:
    many(10_000).save(tmp_path / "s")
    start = time.process_time()
    listing = file.listing(tmp_path / "s")
    assert time.process_time() - start < 1
    assert (len(listing.concepts), listing.concepts[9_999]["name"]) == (10_000, "concept number 9999")
    assert len(Subspace.load(tmp_path / "s").concepts) == 10_000


def test_a_listing_reads_no_tensor(tmp_path: Path) -> None:
    path, subspace = tmp_path / "s", trained()
    subspace.save(path)
    start = storage.read_header(path).body_start
    path.write_bytes(path.read_bytes()[:start] + bytes(path.stat().st_size - start))
    listing = file.listing(path)
    assert (listing.base, listing.basis_version, listing.generation) == ("small-base", subspace.basis_version, 1)
    assert [entry["name"] for entry in listing.concepts] == list(subspace.concepts)
    assert listing.concepts[2]["retention"] >= 0.9


# What is refused


def test_whoever_read_an_older_generation_is_told(tmp_path: Path) -> None:
    path = tmp_path / "s"
    trained().save(path)
    mine, theirs = Subspace.load(path), Subspace.load(path)
    theirs = theirs.merge({"theirs": draw(8)}).save(path)
    with pytest.raises(ConflictError, match="generation 1 was read but it is at 2 now"):
        mine.merge({"mine": draw(9)}).save(path)
    assert "theirs" in Subspace.load(path).concepts
    assert theirs.drop("theirs").save(path).generation == 3  # a saved value knows its new generation


def test_a_file_that_was_never_read_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "s"
    trained().save(path)
    with pytest.raises(ConflictError, match="exists already"):
        trained().save(path)
    assert trained().save(path, replace=True).generation == 2


def test_another_file_than_the_one_that_was_read_is_not_overwritten(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    trained().save(one)
    trained().merge({"others": draw(8)}).save(other)  # both at generation 1
    held = other.read_bytes()
    with pytest.raises(ConflictError, match="other exists already: read it"):
        Subspace.load(one).save(other)
    assert other.read_bytes() == held
    assert Subspace.load(one).save(other, replace=True).generation == 2
    copied = Subspace.load(one).save(tmp_path / "new")
    assert (copied.generation, copied.file) == (1, tmp_path / "new")
    assert copied.save(tmp_path / "new").generation == 2  # it goes on there
    (tmp_path / "link").symlink_to(one)
    assert Subspace.load(tmp_path / "link").save(one).generation == 2  # two names of one file
    one.unlink()
    with pytest.raises(ConflictError, match="is gone: generation 2 was read; pass replace=True"):
        replace(copied, file=one, generation=2).save(one)


@pytest.fixture
def weighted(tmp_path: Path) -> tuple[Path, Mapping[str, Tensor]]:
    """A file whose basis comes from weights, and the weights."""
    weights = {layer: torch.randn(out, width) for layer, (out, width, _) in SHAPES.items()}
    Subspace.fit({"a": draw(0), "b": draw(1)}, basis="weights", derived_rank=4, weights=weights).save(tmp_path / "s")
    return tmp_path / "s", weights


def test_what_needs_the_bases_weights_says_so(weighted: tuple[Path, Mapping[str, Tensor]]) -> None:
    path, weights = weighted
    assert "comes from the base's weights" in refusal(lambda: Subspace.load(path))
    assert Subspace.load(path, weights).complete
    missing = {layer: weight for layer, weight in weights.items() if layer != "unet.a"}
    assert "unet.a" in refusal(lambda: Subspace.load(path, missing))


def test_an_incomplete_subspace_is_good_for_looking_only(weighted: tuple[Path, Mapping[str, Tensor]]) -> None:
    """Its derived columns are missing, so an update made of it would be a wrong one."""
    path, weights = weighted
    look, whole = file.load(path, look=True), Subspace.load(path, weights)
    assert not look.complete
    assert list(look.concepts) == ["a", "b"]
    torch.testing.assert_close(look.overlap(), whole.overlap())
    for action in (
        lambda: look.save(path),
        lambda: look.lora("a"),
        lambda: look.merge({"c": draw(2)}, weights=weights),
    ):
        assert "without its base's weights" in refusal(action)


def test_looking_is_no_loss_where_nothing_is_missing(tmp_path: Path) -> None:
    trained().save(tmp_path / "s")
    assert file.load(tmp_path / "s", look=True).complete
    Subspace.fit({"a": draw(0)}, basis="random", derived_rank=3).save(tmp_path / "r")
    assert file.load(tmp_path / "r", look=True).complete


def test_values_beyond_float16_are_refused_with_the_concept_named(tmp_path: Path) -> None:
    wild = Concept("wild", {"unet.a": Coefficients(torch.full((2, 1), 1e6), torch.ones(2, 1))}, norm=1.0)
    subspace = replace(trained(), concepts={"wild": wild})
    assert "wild: values up to 1e+06 do not fit float16" in refusal(lambda: subspace.save(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    storage.write(tmp_path / "s", {"a": torch.zeros(2)}, {"other": 1}, expected_generation=None)
    for action in (lambda: Subspace.load(tmp_path / "s"), lambda: file.listing(tmp_path / "s")):
        with pytest.raises(StorageError, match="is not a subspace file"):
            action()


DAMAGE: dict[str, Callable[[dict, dict], object]] = {
    "a basis is missing": lambda tensors, _: tensors.pop("unet.a.share_alpha"),
    "a concept is missing": lambda tensors, _: tensors.pop("concept.00001"),
    "a concept is short": lambda tensors, _: tensors.update({"concept.00000": tensors["concept.00000"][1:]}),
    "a layout is unknown": lambda _, metadata: metadata["concepts"][0].update(layout=9),
    "a name is missing": lambda _, metadata: metadata["concepts"][0].pop("name"),
    "a layer is missing": lambda _, metadata: metadata["layers"].pop(),
    "the base is nothing": lambda _, metadata: metadata.update(base=None),
    "a basis has other rows": lambda tensors, _: tensors.update({"unet.a.share_alpha": torch.zeros(5, 2).half()}),
    "a basis has fewer columns": lambda tensors, _: tensors.update(
        {"unet.a.share_alpha": tensors["unet.a.share_alpha"][:, :1].contiguous()}
    ),
    "the details are no tables": lambda tensors, _: tensors.update(
        {"details": torch.tensor(list(b"[" + b",".join([b"[]"] * 9) + b"]"), dtype=torch.uint8)}
    ),
    "a layout has too many rows": lambda tensors, _: tensors["layouts"][0, 0].add_(99),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, damage: str) -> None:
    tensors, metadata = file.pack(trained())
    metadata = json.loads(json.dumps(metadata))
    DAMAGE[damage](tensors, metadata)
    storage.write(tmp_path / "s", tensors, metadata, expected_generation=None)
    with pytest.raises(StorageError, match="is not a subspace file"):
        Subspace.load(tmp_path / "s")


def test_a_small_file_cannot_ask_for_any_number_of_columns(tmp_path: Path) -> None:
    tensors, metadata = file.pack(Subspace.fit({"a": draw(0)}, basis="random", derived_rank=3))
    metadata = json.loads(json.dumps(metadata))
    layer, side = metadata["layers"][0][0], 10**7
    metadata["layers"][0], metadata["origin"]["rank"] = [layer, side, side, None], 10**6
    tensors |= {f"{layer}.share_{name}": torch.zeros(side, 0).half() for name in ("alpha", "beta")}
    storage.write(tmp_path / "s", tensors, metadata, expected_generation=None)
    with pytest.raises(StorageError, match=r"it asks for 20,000,[0-9,]+ numbers of derived columns, and at most"):
        Subspace.load(tmp_path / "s")


def test_weights_of_another_shape_are_another_base(weighted: tuple[Path, Mapping[str, Tensor]]) -> None:
    path, weights = weighted
    narrow = weights | {"unet.a": weights["unet.a"][:, :5]}
    assert "the base's weight of unet.a is (20, 5), not (20, 12)" in refusal(lambda: Subspace.load(path, narrow))


def test_the_origin_is_read_back(tmp_path: Path) -> None:
    subspace = Subspace.fit({"a": draw(0)}, basis="random", basis_seed=7, derived_rank=3)
    subspace.save(tmp_path / "s")
    again = Subspace.load(tmp_path / "s")
    assert again.origin == Origin("random", 3, 7)
    for layer, basis in again.layers.items():
        assert torch.equal(basis.alpha[:, :3], subspace.layers[layer].alpha[:, :3])
