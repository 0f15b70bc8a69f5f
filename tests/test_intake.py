"""Facts about LoRAs from elsewhere becoming concepts: names, groups, retention, the commands, and what they refuse."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from share_diffusion import intake
from share_diffusion.__main__ import main
from share_diffusion.account import Account, group_retention
from share_diffusion.base import load_base
from share_diffusion.capacity import Capacity
from share_diffusion.comparison import compare
from share_diffusion.file import load
from share_diffusion.intake import Source, sources, take_in
from share_diffusion.kinship import cosines, group_of, likeness, row_spaces, seed_groups
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Subspace

LAYERS = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (20, 16),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (20, 30),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (18, 18),
}


def random_lora(
    seed: int, rank: int = 2, down_seed: int | None = None, layers: dict[str, tuple[int, int]] | None = None
) -> LoRA:
    """A LoRA of normal factors; the same `down_seed` is the same random start of `down`."""
    ups = torch.Generator().manual_seed(seed)
    downs = torch.Generator().manual_seed(seed + 1000 if down_seed is None else down_seed)
    made = {}
    for layer, (out, into) in (layers or LAYERS).items():
        down = torch.randn(rank, into, generator=downs)
        made[layer] = Factors(torch.randn(out, rank, generator=ups), down + 0.05 * torch.randn(rank, into, generator=ups))
    return LoRA(made)


def written(folder: Path, name: str, lora: LoRA, **metadata: str) -> Path:
    """A LoRA's file."""
    path = folder / f"{name}.safetensors"
    lora.write(path, dtype=torch.float32, metadata={key.replace("__", "."): value for key, value in metadata.items()})
    return path


def refusal(action) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    return str(caught.value)


# Kinship


def test_the_cosine_of_two_updates_is_that_of_their_dense_forms() -> None:
    first, second = random_lora(0), random_lora(1)
    first = LoRA({**first.layers, **{layer: random_lora(1).layers[layer] for layer in list(LAYERS)[:1]}})

    def dense(lora: LoRA, layers) -> Tensor:
        return torch.cat([lora.layers[layer].dense().double().flatten() for layer in layers])

    whole = torch.cosine_similarity(dense(first, LAYERS), dense(second, LAYERS), dim=0)
    found = cosines(first, second)
    assert found[""] == pytest.approx(float(whole), rel=1e-6)
    for layer in LAYERS:
        one = torch.cosine_similarity(dense(first, [layer]), dense(second, [layer]), dim=0)
        assert found[group_of(layer)] == pytest.approx(float(one), rel=1e-6)
    assert cosines(first, first)[""] == pytest.approx(1)


def test_adapters_of_one_seed_are_grouped_whatever_they_learned() -> None:
    loras = {"a": random_lora(0, down_seed=7), "b": random_lora(1), "c": random_lora(2, down_seed=7), "d": random_lora(3)}
    spaces = {name: row_spaces(lora) for name, lora in loras.items()}
    assert seed_groups(spaces) == [["a", "c"]]
    assert likeness(spaces["a"], spaces["c"]) > 0.95
    assert abs(cosines(loras["a"], loras["c"])[""]) < 0.5


def test_the_row_space_does_not_change_with_the_gauge() -> None:
    lora, turn = random_lora(0), torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
    moved = LoRA({k: Factors(f.up @ turn, torch.linalg.inv(turn) @ f.down) for k, f in lora.layers.items()})
    assert likeness(row_spaces(lora), row_spaces(moved)) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("layer", "group"),
    [
        ("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "unet ff"),
        ("unet.down_blocks.0.resnets.0.conv1", "unet conv"),
        ("unet.down_blocks.0.attentions.0.proj_in", "unet other"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder ff"),
        ("transformer.transformer_blocks.0.attn.to_q", "transformer attention"),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "text_encoder_3 attention"),
    ],
)
def test_every_layer_has_a_group(layer: str, group: str) -> None:
    assert group_of(layer) == group


# Names


def test_names_come_from_stems_folders_and_flags(tmp_path: Path) -> None:
    (tmp_path / "robot").mkdir()
    paths = [
        str(tmp_path / "ink.safetensors"),
        str(tmp_path / "robot" / "pytorch_lora_weights.safetensors"),
        str(tmp_path / "robot"),
    ]
    found = sources(paths[:2], [f"toon={tmp_path / 'x.safetensors'}"], ["subject", "ink=style"], ["robot=a robot"])
    assert [(source.name, source.kind, source.trigger) for source in found] == [
        ("ink", "style", ""),
        ("robot", "subject", "a robot"),
        ("toon", "subject", ""),
    ]
    assert sources([paths[0]], [f"better={paths[0]}"])[0].name == "better"


def test_one_name_for_two_files_is_refused_with_the_fix(tmp_path: Path) -> None:
    paths = [str(tmp_path / "a" / "ink.safetensors"), str(tmp_path / "b" / "Ink.safetensors")]
    assert f"would all be called 'ink'; name them apart with --name OTHER={paths[1]}" in refusal(lambda: sources(paths))
    assert [s.name for s in sources(paths, [f"ink2={paths[1]}"])] == ["ink", "ink2"]


def test_all_that_is_wrong_with_the_flags_is_said_at_once() -> None:
    message = refusal(lambda: sources(["a:b.safetensors"], ["x"], ["q=subject", "thing"], []))
    for words in (
        "--name 'x' is not NAME=PATH".replace("PATH", "VALUE"),
        "give it a name with --name",
        "of no concept here",
        "--kind 'thing'",
    ):
        assert words in message
    assert "no LoRA is given" in refusal(lambda: sources([]))


def test_the_trigger_is_read_from_the_file_or_its_sidecar(tmp_path: Path) -> None:
    told = written(tmp_path, "told", random_lora(0), modelspec__trigger_phrase="inkish", modelspec__license="CC0")
    beside = written(tmp_path, "beside", random_lora(1))
    beside.with_suffix(".json").write_text(json.dumps({"activation text": " toonish "}))
    subspace, _ = take_in(Subspace(), sources([str(told), str(beside)]), Capacity())
    assert [concept.trigger for concept in subspace.concepts.values()] == ["inkish", "toonish"]
    assert subspace["told"].details["metadata"] == {"modelspec.license": "CC0"}
    assert subspace["told"].details["source"] == "told.safetensors"
    assert subspace["told"].details["license"] == "CC0"


# Taking in


def test_many_truncations_leave_the_best_of_the_final_bases_and_the_truth_about_it(tmp_path: Path, monkeypatch) -> None:
    """Twelve files into bases of five columns: what is told is what is held, and a joint fit holds hardly more."""
    loras = {f"c{number}": random_lora(number, 2) for number in range(12)}
    found = [Source(name, written(tmp_path, name, lora)) for name, lora in loras.items()]
    joint, _ = take_in(Subspace(), found, Capacity(rank=5))
    monkeypatch.setattr(intake, "JOINT_LIMIT", 0)
    streamed, _ = take_in(Subspace(), found, Capacity(rank=5))
    told = []
    for name, lora in loras.items():
        held = streamed.lora(name)
        missing = sum(
            float((entry.dense() - held.layers[layer].dense()).double().square().sum()) for layer, entry in lora.layers.items()
        )
        assert streamed[name].retention == pytest.approx(1 - missing / lora.norm**2, abs=1e-5)
        told.append(streamed[name].retention)
    assert sum(told) > 0.9 * sum(joint[name].retention for name in loras)
    thin, _ = take_in(Subspace(), found, Capacity(rank=5), pseudo_rank=1)
    assert {concept.pseudo_rank for concept in thin.concepts.values()} == {1}


def test_one_at_a_time_keeps_what_is_asked_as_all_at_once_does(tmp_path: Path, monkeypatch) -> None:
    """Mixed ranks, and layers that are absent in some."""
    loras = {"a": random_lora(0, 1), "b": random_lora(1, 5), "c": random_lora(2, 3)}
    loras["b"] = LoRA({layer: entry for layer, entry in loras["b"].layers.items() if "text" not in layer})
    found = [Source(name, written(tmp_path, name, lora)) for name, lora in loras.items()]
    joint, account = take_in(Subspace(), found, Capacity(retain=0.99))
    monkeypatch.setattr(intake, "JOINT_LIMIT", 0)
    streamed, _ = take_in(Subspace(), found, Capacity(retain=0.99))
    for subspace in (joint, streamed):
        for name, lora in loras.items():
            held = subspace.lora(name)
            missing = sum(
                float((entry.dense() - (held.layers[layer].dense() if layer in held.layers else 0)).double().square().sum())
                for layer, entry in lora.layers.items()
            )
            assert 1 - missing / lora.norm**2 == pytest.approx(subspace[name].retention, abs=1e-5)
            assert subspace[name].retention >= 0.99 - 1e-6
    shares = group_retention(joint, account)
    assert set(shares["b"]) == {"unet attn1", "unet attn2"}
    for name, lora in loras.items():
        weighted = sum(shares[name][group] * energy for group, energy in account.energies[name].items())
        assert weighted / lora.norm**2 == pytest.approx(joint[name].retention, abs=1e-5)


def test_what_a_conversion_lost_counts_as_lost() -> None:
    lora = random_lora(0)
    layers = {layer: replace(entry, lost=entry.energy / 3) for layer, entry in lora.layers.items()}
    cut = LoRA(layers)
    assert cut.lost == pytest.approx(0.25)
    concept = Subspace.fit({"a": cut}, capacity=Capacity(retain=1.0))["a"]
    assert concept.retention == pytest.approx(0.75)
    assert concept.norm == pytest.approx(lora.norm * (4 / 3) ** 0.5)


def test_loras_of_two_kinds_of_base_are_refused(tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    files = [written(tmp_path, f"w{width}", random_lora(0, layers={name: (8, width)})) for width in (768, 2048)]
    message = refusal(lambda: take_in(Subspace(), sources([str(file) for file in files]), Capacity()))
    assert "w2048.safetensors is for Stable Diffusion XL, what was before it for Stable Diffusion 1.x" in message


def test_one_update_under_two_names_is_told(tmp_path: Path) -> None:
    lora = random_lora(0)
    paths = [
        str(written(tmp_path, name, one)) for name, one in {"a": lora, "b": lora, "c": random_lora(0, down_seed=3)}.items()
    ]
    subspace, account = take_in(Subspace(), sources(paths), Capacity())
    assert account.notes == ["b is the same update as a; drop one of the two"]
    assert list(subspace.concepts) == ["a", "b", "c"]
    assert "is given twice" in refusal(lambda: sources([paths[0], paths[0]]))


def test_an_account_forgets_the_matrices() -> None:
    account, lora = Account(), random_lora(0)
    account.enter("a", "a.safetensors", lora)
    kept = sum(rows.numel() * rows.element_size() for rows in account.spaces["a"].values())
    assert kept <= 2 * sum(entry.down.numel() for entry in lora.layers.values())


# Comparing


def test_a_subspace_spans_what_it_holds() -> None:
    loras = {"a": random_lora(0), "b": random_lora(1)}
    subspace = Subspace.fit(loras)
    facts = compare(loras["a"], subspace)
    assert facts["spanned"][""] == pytest.approx(1, abs=2e-3)
    assert facts["concepts"]["a"] == pytest.approx(1, abs=1e-3)
    assert compare(random_lora(5), Subspace.fit({"a": loras["a"]}))["spanned"][""] < 0.3
    both = compare(subspace, Subspace.fit({"a": loras["a"]}))
    assert both["spanned"]["second_by_first"] == pytest.approx(1, abs=2e-2)
    assert both["spanned"]["first_by_second"] == pytest.approx(0.5, abs=0.1)
    assert both["concepts"]["a"]["cosine"][""] == pytest.approx(1, abs=2e-3)
    assert both["only_first"] == ["b"]


def resized(lora: LoRA, layers: list[str]) -> LoRA:
    """A LoRA whose factors are twice as wide in some layers, as for another base."""
    return LoRA({k: Factors(f.up, f.down.repeat(1, 2)) if k in layers else f for k, f in lora.layers.items()})


def test_layers_of_another_shape_are_not_in_common_and_that_is_told(tmp_path: Path, capsys) -> None:
    lora, odd = random_lora(0), list(LAYERS)[:2]
    other = resized(lora, odd)
    facts = compare(lora, other)
    assert (facts["layers"]["common"], facts["layers"]["other_shape"]) == (len(LAYERS) - 2, 2)
    same = sum(lora.layers[layer].energy for layer in LAYERS if layer not in odd)
    assert facts["cosine"][""] == pytest.approx(same / (lora.norm * other.norm))
    held, foreign = Subspace.fit({"a": lora}), Subspace.fit({"a": other})
    assert compare(other, held)["other_shape"] == compare(held, foreign)["other_shape"] == 2
    assert compare(lora, held)["other_shape"] == compare(held, held)["other_shape"] == 0
    files = [str(written(tmp_path, name, one)) for name, one in (("a", lora), ("b", other))]
    for name, one in (("c", held), ("d", foreign)):
        one.save(tmp_path / f"{name}.safetensors")
        files.append(str(tmp_path / f"{name}.safetensors"))
    for first, second in ((0, 1), (1, 2), (2, 3)):
        assert main(["compare", files[first], files[second]]) == 0
        assert "2 layers of one name but of different shapes in A and B, not in common" in capsys.readouterr().out


# The commands, on the embedded base


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, int]]:
    return {path: shape_of(module)[0] for path, module in select(load_base("tiny")).items()}


@pytest.fixture
def files(tmp_path: Path, shapes) -> list[str]:
    """Three LoRA files for `tiny`, two of one seed."""
    seeds = {"ink": (0, 5), "toon": (1, 5), "film": (2, None)}
    return [str(written(tmp_path, name, random_lora(seed, 3, down, shapes))) for name, (seed, down) in seeds.items()]


def test_fit_merge_rename_and_compare(tmp_path: Path, files: list[str], capsys) -> None:
    out = tmp_path / "s.safetensors"
    base = ["--pretrained_model_name_or_path", "tiny"]
    assert main(["fit", *files[:2], "--output", str(out), "--trigger", "ink=inkish", *base]) == 0
    said = capsys.readouterr().out
    assert said.index("ink ") < said.index(f"{out}: ")  # told before it is written
    assert "same seed: ink, toon" in said
    assert "unet attn2" in said.splitlines()[0]
    assert load(out).base.name == "tiny"
    before = out.read_bytes()
    assert main(["merge", str(out), files[2], "--basis_rank", "4", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"ink +held before: retention (1\.0000|0\.99\d\d) -> 0\.", said)
    assert out.read_bytes() == before
    assert main(["merge", str(out), files[2], "--kind", "subject"]) == 0
    assert load(out)["film"].kind == "subject"
    assert main(["rename", str(out), "ink", "pen"]) == 0
    subspace = load(out)
    assert list(subspace.concepts) == ["pen", "toon", "film"]
    assert subspace["pen"].trigger == "inkish"
    capsys.readouterr()
    assert main(["compare", files[0], f"{out}::pen", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cosine"][""] > 0.999
    assert main(["compare", files[0], files[1]]) == 0
    assert "started from the same seed" in capsys.readouterr().out
    for pair in ([files[0], str(out)], [str(out), f"{out}.bak"]):
        assert main(["compare", *pair]) in (0, 1)
    assert main(["generate", "--subspace", str(out), "--prompt", "x", "--blend", "pen", "--steps", "1", "--device", "cpu",
                 "--output", str(tmp_path / "x.png")]) == 0  # fmt: skip


def test_a_file_without_a_known_base_goes_onto_the_right_one_and_tells_the_wrong_one(tmp_path: Path, files, capsys) -> None:
    out = tmp_path / "s.safetensors"
    assert main(["fit", files[0], "--output", str(out)]) == 0
    base = load(out).base
    assert base.architecture == ""
    assert "a UNet that reads text of width" in base.name
    words = ["--prompt", "x", "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "x.png")]
    assert main(["generate", "--subspace", str(out), "--blend", "ink", *words]) == 0
    other = written(tmp_path, "other", random_lora(0))
    wrong = tmp_path / "w.safetensors"
    assert main(["fit", str(other), "--output", str(wrong)]) == 0
    capsys.readouterr()
    assert main(["generate", "--subspace", str(wrong), "--blend", "other", *words]) == 1
    assert "wrong base" in capsys.readouterr().err
    refused = tmp_path / "r.safetensors"
    assert main(["fit", str(other), "--output", str(refused), "--base", "tiny"]) == 1
    assert "wrong base" in capsys.readouterr().err
    assert not refused.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "{0}", "--output", "{0}"], "is there already; merge into it"),
        (["fit", "{0}", "--output", "no/where.safetensors"], "is not a folder; create it first"),
        (["fit", "none.safetensors", "--output", "s.safetensors"], "no such file"),
        (["fit", "{0}", "{1}x", "--output", "s.safetensors"], "no such file"),
        (["fit", "{0}", "--output", "s.safetensors", "--budget", "lots"], "is not a size"),
        (["fit", "{0}", "--output", "s.safetensors", "--retain", "2"], "retain is 2"),
        (["fit", "none.safetensors", "{0}", "nor.safetensors", "--output", "s.safetensors"], "nor.safetensors"),
        (["fit", "--name", "a={0}", "--name", "b={0}", "--output", "s.safetensors"], "the names a, b; give it one"),
        (["fit", "{0}", "--output", "s.safetensors", "--budget", "1"], "budget is 1 bytes; with ink in it"),
        (["merge", "{0}", "{1}", "--against", "{2}"], "--against is for patches"),
        (["compare", "{0}", "none.safetensors"], "no such file"),
        (["rename", "none.safetensors", "a", "b"], "none.safetensors"),
    ],
)
def test_bad_requests_are_one_message_and_no_file(tmp_path: Path, monkeypatch, files, capsys, words, expected) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert main([word.format(*files) for word in words]) == 1
    assert expected in capsys.readouterr().err
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == before


def test_a_name_that_is_taken_is_refused_before_anything_is_read(tmp_path: Path, files, capsys) -> None:
    out = tmp_path / "s.safetensors"
    assert main(["fit", files[0], "--output", str(out)]) == 0
    save_file({"broken": torch.ones(1)}, tmp_path / "broken.safetensors")
    assert main(["merge", str(out), files[0], str(tmp_path / "broken.safetensors")]) == 1
    assert "ink: already in the file; drop or rename the old one" in capsys.readouterr().err
    assert main(["merge", str(out), files[1]]) == 0
    assert main(["rename", str(out), "ink", "TOON"]) == 1
    assert "already there as 'toon'" in capsys.readouterr().err
    assert main(["merge", str(out), files[2], "--distil"]) == 1
    assert "distilling needs the base" in capsys.readouterr().err


def test_files_whose_columns_come_from_the_weights_are_compared_without_the_base(tmp_path: Path) -> None:
    lora, other = random_lora(0), random_lora(1)
    weights = {
        layer: torch.randn(entry.shape, generator=torch.Generator().manual_seed(1)) for layer, entry in lora.layers.items()
    }
    for name, one in {"a": lora, "b": other}.items():
        Subspace.fit({name: one}, basis="weights", derived_rank=2, weights=weights).save(tmp_path / f"{name}.safetensors")
    looked = {name: load(tmp_path / f"{name}.safetensors", look=True) for name in "ab"}
    whole = {name: load(tmp_path / f"{name}.safetensors", weights) for name in "ab"}
    for one, two in (("a", "a"), ("a", "b")):
        expected = compare(whole[one], whole[two])["spanned"]["first_by_second"]
        facts = compare(looked[one], looked[two])
        assert facts["spanned"]["first_by_second"] == pytest.approx(expected, abs=1e-3)
    assert compare(looked["a"], Subspace.fit({"b": other}))["spanned"]["first_by_second"] is None
    assert main(["compare", *[str(tmp_path / "a.safetensors")] * 2]) == 0
