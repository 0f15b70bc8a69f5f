"""The judge: a small convolutional classifier that says what a picture of the picture world shows.

It has one head per factor (style, subject, colour, background, count), each with the answer "unknown" for what is none
of its words. It is trained by `train/judge.py` on rendered pictures that went through the base's autoencoder, as every
judged picture does, with all factors drawn independently: it has no reason to expect one factor from another.

    n  pictures        C  labels of a head
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from share_diffusion.world.characters import CHARACTERS
from share_diffusion.world.render import PLAIN
from share_diffusion.world.scene import BACKGROUNDS, COLOURS, SIDE, SUBJECTS
from share_diffusion.world.styles import STYLES

UNKNOWN = "unknown"
HEADS: dict[str, tuple[str, ...]] = {
    "style": (PLAIN, *STYLES, UNKNOWN),
    "subject": (*SUBJECTS, *CHARACTERS, UNKNOWN),
    "colour": (*COLOURS, UNKNOWN),
    "background": (*BACKGROUNDS, UNKNOWN),
    "count": ("1", "2", "3", UNKNOWN),
}
WEIGHTS = Path(__file__).parents[1] / "assets" / "judge.safetensors"
WIDTHS = (32, 64, 96, 128)
BATCH = 128


class Block(nn.Module):
    """A 3 x 3 convolution to a new width, then a residual one."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.change = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.change_norm = nn.BatchNorm2d(width)
        self.refine = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.refine_norm = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (n, width, height / stride, width / stride)."""
        maps = F.relu(self.change_norm(self.change(maps)))
        return F.relu(maps + self.refine_norm(self.refine(maps)))


class Network(nn.Module):
    """Four blocks from 32 x 32 down to 4 x 4, mean and maximum over the last map, one linear layer per head."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [Block(before, width, 2) for before, width in pairwise(WIDTHS)]
        self.trunk = nn.Sequential(nn.PixelUnshuffle(2), Block(12, WIDTHS[0], 1), *blocks)
        self.heads = nn.ModuleDict({head: nn.Linear(2 * WIDTHS[-1], len(labels)) for head, labels in HEADS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return each head's logits, (n, C), of pictures (n, 3, 64, 64) in [-1, 1]."""
        last = self.trunk(pictures)
        pooled = torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}


class Judge:
    """Says what pictures show; where no label has half the probability, it says "unknown"."""

    def __init__(self, network: Network) -> None:
        self.network = network.float().eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Judge:
        """Read the judge from a file, or the one that comes with the package.

        Raises ValueError if the file is missing or was trained for other labels than the picture world's.
        """
        file = WEIGHTS if path is None else Path(path)
        if not file.is_file():
            raise ValueError(f"there is no judge at {file}; train one with: python train/judge.py")
        with safe_open(file, "pt") as stored:
            labels = json.loads((stored.metadata() or {}).get("labels", "null"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if labels != {head: list(known) for head, known in HEADS.items()}:
            raise ValueError(f"{file} judges other labels than this picture world's; train it with: python train/judge.py")
        network = Network()
        network.load_state_dict(tensors, strict=False)  # only BatchNorm's step counters are not stored
        return cls(network)

    @torch.no_grad()
    def probabilities(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return each head's probabilities, (n, C) in the order of `HEADS`, of pictures (n, 3, 64, 64) in [-1, 1]."""
        if pictures.ndim != 4 or pictures.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"pictures are {tuple(pictures.shape)}; the judge reads (n, 3, {SIDE}, {SIDE}) in [-1, 1]")
        parts = [self.network(part.float()) for part in pictures.split(BATCH)]
        return {head: torch.cat([part[head] for part in parts]).softmax(dim=1) for head in HEADS}

    def __call__(self, pictures: Tensor) -> dict[str, list[str]]:
        """Return each head's label for every picture."""
        return {head: name_all(head, table) for head, table in self.probabilities(pictures).items()}


def name_all(head: str, probabilities: Tensor) -> list[str]:
    """Return a head's label for every row of probabilities (n, C)."""
    best, chosen = probabilities.max(dim=1)
    rows = zip(best.tolist(), chosen.tolist(), strict=True)
    return [HEADS[head][index] if share >= 0.5 else UNKNOWN for share, index in rows]


def write_judge(network: Network, path: Path) -> None:
    """Write the weights in half precision with the labels they stand for, whole or not at all."""
    tensors = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(save(tensors, metadata={"labels": json.dumps(HEADS)}))
    part.replace(path)
