"""A frozen linear or convolution with low-rank updates beside it.

    y = base(x) + sum over updates of  beta @ m_n @ ... @ m_1 @ (alpha.T @ x)

An update is a chain of matrices: `alpha` (in, k) first, `beta` (out, k') last, small `middle` matrices (rows, columns)
between them, applied in order. A blend that all samples share is one update without a middle, its core multiplied into the
bases; a concept in training is one or two updates whose sides are parameters or products of bases and coefficients that are
parameters. With no update the layer *is* its base.

A middle matrix with a batch dimension in front gives every sample its own core. With masks `where`, the middle holds one
core per region, one under the other, (regions k, k'), and y(p) = beta sum_i m_i(p) C_i alpha.T x(p): alpha.T x is computed
once however many regions there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from share_diffusion.regions import Field


@dataclass(frozen=True)
class Update:
    """One low-rank path through a layer: `alpha` (in, k), `middle` matrices, `beta` (out, k'), masks of regions."""

    alpha: Tensor
    middle: tuple[Tensor, ...]
    beta: Tensor
    where: Field | None = None

    def to(self, like: Tensor) -> Update:
        """Return the update on the device and in the precision of a tensor."""
        if self.alpha.device == like.device and self.alpha.dtype == like.dtype:
            return self
        return Update(self.alpha.to(like), tuple(matrix.to(like) for matrix in self.middle), self.beta.to(like), self.where)


class ShareLayer(nn.Module):
    """Wraps a frozen layer; transparent to `state_dict`, to hooks on the layer and to code that reads its weight."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.updates: tuple[Update, ...] = ()
        self.register_state_dict_post_hook(_forget_wrapper)
        self.register_load_state_dict_pre_hook(_expect_wrapper)

    def set(self, updates: Sequence[Update]) -> None:
        """Make these updates active; tensors that ask for a gradient keep their own precision."""
        self.updates = tuple(updates)

    def add(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the output with every active update added."""
        for index, update in enumerate(self.updates):
            if update.alpha.device != output.device:  # once after the model has moved
                update = update.to(output.to(update.alpha.dtype))
                self.updates = (*self.updates[:index], update, *self.updates[index + 1 :])
            output = output + self.path(inputs.to(output.device), update.to(output))
        return output

    def path(self, inputs: Tensor, update: Update) -> Tensor:
        """Return one update's contribution."""
        hidden = inputs.to(update.alpha.dtype) @ update.alpha
        if update.where is not None:
            masks = update.where.means(hidden) if hidden.ndim == 2 else update.where.tokens(hidden.shape[-2], hidden)
            hidden = (masks[..., None] * hidden[..., None, :]).flatten(-2)
        for matrix in update.middle:
            if matrix.ndim == 2:
                hidden = hidden @ matrix
            else:
                wide = hidden[:, None] if hidden.ndim == 2 else hidden
                hidden = (wide @ fitting(matrix, wide)).view(*hidden.shape[:-1], -1)
        return hidden @ update.beta.mT

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.base(inputs, *args, **kwargs)
        return self.add(inputs, output) if self.updates else output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class ShareLinear(ShareLayer):
    """A frozen `nn.Linear` with updates."""


class ShareConv(ShareLayer):
    """A frozen `nn.Conv2d` with updates: `alpha` is a convolution of the base's own kernel, the rest is 1 x 1."""

    def path(self, inputs: Tensor, update: Update) -> Tensor:
        base = self.base
        assert isinstance(base, nn.Conv2d)
        kernel = update.alpha.mT.unflatten(1, (-1, *base.kernel_size))
        inputs, padding = inputs.to(update.alpha.dtype), base.padding
        if base.padding_mode != "zeros":
            inputs, padding = F.pad(inputs, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        hidden = F.conv2d(inputs, kernel, stride=base.stride, padding=padding, dilation=base.dilation)
        if update.where is not None:
            masks = update.where.map(hidden.shape[-2], hidden.shape[-1], hidden)
            hidden = (masks[:, :, None] * hidden[:, None]).flatten(1, 2)
        for matrix in update.middle:
            if matrix.ndim == 2:
                hidden = F.conv2d(hidden, matrix.mT[:, :, None, None])
            else:
                hidden = (fitting(matrix, hidden).mT @ hidden.flatten(2)).unflatten(2, hidden.shape[2:])
        return F.conv2d(hidden, update.beta[:, :, None, None])


def fitting(matrix: Tensor, hidden: Tensor) -> Tensor:
    """Return the samples' matrices (B, k, k') if the layer sees that many samples."""
    if matrix.shape[0] != hidden.shape[0]:
        raise ValueError(f"blends are set for {matrix.shape[0]} samples, but a layer sees {hidden.shape[0]}")
    return matrix


def wrap(base: nn.Module) -> ShareLayer:
    """Return the layer wrapped, or raise TypeError for what is neither a linear nor an ungrouped 2-D convolution."""
    if isinstance(base, nn.Linear):
        return ShareLinear(base)
    if isinstance(base, nn.Conv2d) and base.groups == 1:
        return ShareConv(base)
    raise TypeError(f"{type(base).__name__} cannot be adapted; Linear and Conv2d with groups=1 can")


def weighted(updates: Mapping[str, Sequence[Update]], weight: float) -> dict[str, list[Update]]:
    """Return the updates at a weight; of weight 0 there are none."""
    if not weight:
        return {}
    return {path: [replace(update, beta=weight * update.beta) for update in some] for path, some in updates.items()}


def cast_update(update: Update, weight: Tensor, kind: torch.dtype) -> Update:
    """Return the update in a precision, on the device of a layer's weight unless that is the meta device."""
    device = update.alpha.device if weight.device.type == "meta" else weight.device
    return replace(update.to(torch.empty(0, dtype=kind, device=device)))


def _forget_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Spell the base's entries without the wrapper, so that a model saved while attached is an ordinary model."""
    for key in [key for key in state if key.startswith(f"{prefix}base.")]:
        state[prefix + key[len(prefix) + 5 :]] = state.pop(key)


def _expect_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept entries spelled without the wrapper."""
    for key, _value in module.base.named_parameters():  # type: ignore[union-attr]
        if prefix + key in state:
            state[f"{prefix}base.{key}"] = state.pop(prefix + key)
