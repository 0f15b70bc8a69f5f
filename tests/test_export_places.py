"""Facts about where exports go: what is replaced is an earlier export and nothing else, and a ComfyUI folder keeps its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import small_sd
from test_export import subspace_on

from share_diffusion.__main__ import main
from share_diffusion.base import load_base
from share_diffusion.export import export
from share_diffusion.export.verify import verify
from share_diffusion.subspace import Subspace


@pytest.fixture(scope="module")
def sd() -> Any:
    return small_sd()


@pytest.fixture(scope="module")
def subspace(sd: Any) -> Subspace:
    return subspace_on(sd)


def held(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(words: str, folder: Path, *arguments: Any, **options: Any) -> None:
    """An export that must be refused with these words and change nothing in the folder."""
    before = held(folder)
    with pytest.raises(ValueError, match=words):
        export(*arguments, **options)
    assert held(folder) == before


# Formats that are a folder as a whole


@pytest.mark.parametrize("format", ["peft", "pipeline"])
def test_only_an_earlier_export_is_replaced(sd: Any, subspace: Subspace, tmp_path: Path, format: str) -> None:
    options: dict[str, Any] = {"format": format, "pipeline": sd, "preview": False, "replace": True}
    work = tmp_path / "my work"
    (work / "drafts").mkdir(parents=True)
    (work / "thesis.txt").write_text("years")
    (work / "drafts" / "one.txt").write_text("weeks")
    refused(f"is not empty and no earlier export of format {format}", tmp_path, subspace, "ink", work, **options)
    made = tmp_path / "made"
    export(subspace, "ink", made, **options)
    export(subspace, "owl", made, **options)
    first = held(made)
    assert first
    for stray in ("notes.txt", "unet/optimizer.pt", "mine/adapter_config.json"):
        (made / stray).parent.mkdir(exist_ok=True)
        (made / stray).write_text("mine")
        refused(rf"holds {stray}, which no export .* writes; .*another folder", tmp_path, subspace, "ink", made, **options)
        (made / stray).unlink()
    (tmp_path / "one").write_text("a file")
    refused("is a file", tmp_path, subspace, "ink", tmp_path / "one", **options)
    (tmp_path / "empty").mkdir()
    export(subspace, "owl", tmp_path / "empty", **options)
    assert held(tmp_path / "empty").keys() == first.keys()


@pytest.mark.parametrize("format", ["peft", "pipeline"])
def test_the_working_folder_and_what_holds_it_are_no_target(
    sd: Any, subspace: Subspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    (here / "thesis.txt").write_text("years")
    monkeypatch.chdir(here)
    for output in (".", here, here.parent, tmp_path, "/"):
        options: dict[str, Any] = {"format": format, "pipeline": sd, "preview": False, "replace": True}
        refused("working folder", tmp_path, subspace, "ink", output, **options)


def test_a_base_is_not_replaced_by_its_own_fusion(subspace: Subspace, tmp_path: Path) -> None:
    pipeline = small_sd()
    export(subspace, "ink", tmp_path / "base", "pipeline", pipeline=pipeline, preview=False)
    pipeline.register_to_config(_name_or_path=str(tmp_path / "base"))
    options: dict[str, Any] = {"format": "pipeline", "pipeline": pipeline, "preview": False, "replace": True}
    refused("is the base itself", tmp_path, subspace, "ink", tmp_path / "base", **options)


def test_what_comes_while_an_export_is_made_is_kept(
    subspace: Subspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from share_diffusion.export import formats

    made, write = tmp_path / "made", formats.write
    export(subspace, "ink", made, "peft")

    def slow(task: Any, stage: Path, name: str) -> None:
        write(task, stage, name)
        (made / "thesis.txt").write_text("years")

    monkeypatch.setattr(formats, "write", slow)
    with pytest.raises(ValueError, match=r"holds thesis\.txt"):
        export(subspace, "owl", made, "peft", replace=True)
    assert (made / "thesis.txt").read_text() == "years"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_each_looks_at_all_its_folders_first(
    subspace: Subspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subspace.save("two.safetensors")
    words = ["export", "two.safetensors", "--each", "--format", "peft", "--output", "each"]
    assert main(words) == 0
    # What it has made is known: a folder a concept, and in it one a component.
    capsys.readouterr()
    assert main(["verify-export", "each"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if not line.startswith(" ")] == [
        f"{name}/{part}" for name in ("ink", "owl") for part in ("text_encoder", "unet")
    ]
    for name in ("ink", "owl"):
        (tmp_path / "each" / name / "notes.txt").write_text("mine")
    before = held(tmp_path)
    assert main([*words, "--replace"]) == 1
    said = capsys.readouterr().err
    assert "each/ink holds notes.txt" in said
    assert "each/owl holds notes.txt" in said
    assert held(tmp_path) == before


def test_the_subspace_file_itself_is_no_output(subspace: Subspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two.safetensors"
    subspace.save(file)
    before = held(tmp_path)
    assert main(["export", str(file), "--blend", "ink", "--output", str(file), "--replace"]) == 1
    assert "is the subspace file itself" in capsys.readouterr().err
    assert held(tmp_path) == before


# A real ComfyUI folder


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_base("tiny")


@pytest.fixture(scope="module")
def concepts(tiny: Any) -> Subspace:
    return subspace_on(tiny)


def comfyui(folder: Path) -> Path:
    """A folder as a ComfyUI in use has it: a VAE, an embedding and a broken download beside the LoRAs."""
    for kind, tensors in {"vae": {"decoder.conv_in.bias": 8}, "embeddings": {"emb_params": 4}}.items():
        (folder / "models" / kind).mkdir(parents=True)
        save_file({name: torch.zeros(size) for name, size in tensors.items()}, folder / "models" / kind / "a.safetensors")
    (folder / "models" / "loras").mkdir()
    (folder / "models" / "loras" / "broken.safetensors").write_bytes(b"half")
    return folder


def test_an_export_into_comfyui_is_judged_by_its_own_files(subspace: Subspace, tmp_path: Path) -> None:
    home = comfyui(tmp_path / "ComfyUI")
    with pytest.raises(ValueError, match="3 files, none of them an export") as caught:
        verify(home)
    assert "models/vae/a.safetensors: neither a LoRA nor a checkpoint" in str(caught.value)
    done = export(subspace, "ink", home, "comfyui", name="ink")
    assert {verdict.file for verdict in done.verdicts} == {"ink.safetensors"}
    assert all(verdict.program for verdict in done.verdicts)
    verdicts = verify(home)
    known = {verdict.file for verdict in verdicts if verdict.program}
    unknown = {verdict.file: verdict.reasons for verdict in verdicts if not verdict.program}
    assert known == {"models/loras/ink.safetensors"}
    assert sorted(unknown) == [f"models/{name}.safetensors" for name in ("embeddings/a", "loras/broken", "vae/a")]
    assert "neither a LoRA nor a checkpoint" in unknown["models/vae/a.safetensors"][0]


def test_a_folder_called_share_is_a_folder_like_any_other(subspace: Subspace, tmp_path: Path) -> None:
    export(subspace, "ink", tmp_path / "share" / "ink.safetensors")
    assert {verdict.file for verdict in verify(tmp_path / "share")} == {"ink.safetensors"}


def test_two_blends_go_into_one_comfyui_and_share_their_base(tiny: Any, concepts: Subspace, tmp_path: Path) -> None:
    home = comfyui(tmp_path / "ComfyUI")
    options: dict[str, Any] = {"format": "comfyui", "pipeline": tiny, "preview": False}
    export(concepts, "ink", home, name="ink", **options)
    base = home / "models" / "share" / "small.base.safetensors"
    stamp, before = base.stat().st_mtime_ns, held(home)
    done = export(concepts, "owl", home, name="my owl", **options)
    # Nothing that was there has changed; the base is there already and stays.
    assert {name: data for name, data in held(home).items() if name in before} == before
    assert base.stat().st_mtime_ns == stamp
    assert sorted(held(home).keys() - before.keys()) == sorted(path.relative_to(home).as_posix() for path in done.files)
    assert home / "user/default/workflows/my owl.json" in done.files
    workflow = json.loads((home / "user/default/api/my owl.json").read_text())
    named = [value for node in workflow.values() for value in node["inputs"].values() if isinstance(value, str)]
    assert {"my owl.safetensors", base.name} <= set(named)
    refused("choose another name with --name", home, concepts, "owl", home, name="ink", **options)
    # The same name with other bytes: not overwritten unless asked to.
    refused(
        r"small\.base\.safetensors .*--precision", home, concepts, "owl", home, name="third", dtype=torch.float32, **options
    )
    export(concepts, "owl", home, name="third", dtype=torch.float32, replace=True, **options)
    assert load_file(base)["alphas_cumprod"].dtype == load_file(base)["unet.out.2.weight"].dtype == torch.float32


def test_without_a_name_the_folder_gives_it(
    subspace: Subspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Comfy").mkdir()
    monkeypatch.chdir(tmp_path / "Comfy")
    export(subspace, "ink", ".", "comfyui")
    assert sorted(held(tmp_path / "Comfy")) == [
        *("models/loras/Comfy.json", "models/loras/Comfy.safetensors"),
        *("user/default/api/Comfy.json", "user/default/workflows/Comfy.json"),
    ]
    subspace.save("two.safetensors")
    words = ["export", "two.safetensors", "--blend", "owl", "--format", "comfyui", "--output", ".", "--no-preview"]
    assert main(words) == 1
    assert "--name" in capsys.readouterr().err
    assert main([*words, "--name", "owl"]) == 0
    assert (tmp_path / "Comfy" / "models" / "loras" / "owl.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [
        ("a/b", "comfyui", "is not safe on every system"),
        ("", "comfyui", "name is empty"),
        ("a.safetensors", "comfyui", "without its ending"),
        ("a", "kohya", "only format comfyui"),
    ],
)
def test_a_name_is_checked(subspace: Subspace, tmp_path: Path, name: str, format: str, words: str) -> None:
    output = tmp_path / ("x" if format == "comfyui" else "x.safetensors")
    refused(words, tmp_path, subspace, "ink", output, format=format, name=name)


# One file


@pytest.mark.parametrize("format", ["kohya", "checkpoint"])
def test_a_subspace_file_is_no_earlier_export(sd: Any, subspace: Subspace, tmp_path: Path, format: str) -> None:
    subspace.save(tmp_path / "mine.safetensors")
    options: dict[str, Any] = {"format": format, "pipeline": sd, "preview": False, "replace": True}
    refused("is a subspace file or a patch", tmp_path, subspace, "ink", tmp_path / "mine.safetensors", **options)


def test_a_preview_of_what_is_replaced_goes_with_it(sd: Any, subspace: Subspace, tmp_path: Path) -> None:
    export(subspace, "ink", tmp_path / "a.safetensors", pipeline=sd)
    assert (tmp_path / "a.png").exists()
    export(subspace, "owl", tmp_path / "a.safetensors", replace=True)
    assert not (tmp_path / "a.png").exists()
    (tmp_path / "b.png").write_bytes(b"my own")
    export(subspace, "owl", tmp_path / "b.safetensors", replace=True)
    assert (tmp_path / "b.png").read_bytes() == b"my own"
