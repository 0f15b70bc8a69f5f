"""The README's section on exports is true: its commands and its Python run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from share_diffusion.__main__ import main
from share_diffusion.base import load_base
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Subspace

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Out to other programs")[2].partition("\n## ")[0]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture
def subspace_file(workplace):
    """A subspace where the README has it, its two concepts random."""
    pipeline, generator = load_base("tiny"), torch.Generator().manual_seed(0)

    def lora():
        shapes = {path: shape_of(module)[0] for path, module in select(pipeline).items()}
        return LoRA(
            {
                path: Factors(torch.randn(out, 3, generator=generator) / 20, torch.randn(3, width, generator=generator) / 20)
                for path, (out, width) in shapes.items()
            }
        )

    path = Path("outputs/tiny/subspace.safetensors")
    path.parent.mkdir(parents=True)
    Subspace(base=identify(pipeline, "tiny")).merge({"watercolor": lora(), "robot": lora()}).save(path)
    return path


@pytest.mark.slow
def test_the_commands_and_the_python_run(subspace_file, capsys):
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 6
    for words in lines:
        assert words[0] == "share-diffusion"
        assert main(words[1:]) == 0, words
    said = capsys.readouterr().out
    assert "truncated: relative error" in said
    assert "diffusers        180 of 180 keys" in said
    assert sorted(path.name for path in Path("exports/ComfyUI/user/default").rglob("*.json")) == ["ComfyUI.json"] * 2
    (code,) = blocks("python")
    exec(code, {})
    assert LoRA.read("blend-diffusers.safetensors").components == LoRA.read("blend.safetensors").components
    # Beside the export the Python lines took nothing but what they name.
    assert sorted(path.name for path in Path().glob("blend*")) == [
        "blend-diffusers.safetensors",
        *("blend.json", "blend.png", "blend.safetensors"),
    ]
