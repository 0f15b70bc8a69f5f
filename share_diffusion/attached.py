"""Put a subspace onto a live pipeline, set what is active, take it off again.

    handle = attach(pipeline, subspace)
    handle.set_blend("watercolor:0.8 + robot:0.5")
    pipeline("a watercolor robot on a beach").images[0]
    handle.detach()

Attaching wraps the layers that the subspace knows; the base's weights are never written, so detaching restores the
model to the last bit by putting the wrapped layers back. Setting a blend changes small tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn

from share_diffusion.blend import Blend
from share_diffusion.layer import ShareLayer, Update, cast_update, core_update, wrap
from share_diffusion.models.identity import identify, weight_of
from share_diffusion.models.layers import layers, parent_of, shape_of
from share_diffusion.subspace import Subspace


class Attached:
    """Wrapped layers of a pipeline, by path; `set` makes updates active, `detach` puts the originals back."""

    def __init__(self, pipeline: Any, paths: Sequence[str]) -> None:
        found = layers(pipeline)
        self.pipeline = pipeline
        self.originals: dict[str, nn.Module] = {path: found[path] for path in paths}
        self.layers: dict[str, ShareLayer] = {}
        for path, module in self.originals.items():
            parent, attribute = parent_of(pipeline, path)
            self.layers[path] = wrap(module)
            self.layers[path].train(module.training)
            setattr(parent, attribute, self.layers[path])

    def set(self, updates: Mapping[str, Sequence[Update]]) -> None:
        """Make these updates active, and no others."""
        for path, layer in self.layers.items():
            layer.set(updates.get(path, ()))

    def detach(self) -> None:
        """Put the original layers back; harmless when done twice."""
        for path, module in self.originals.items():
            parent, attribute = parent_of(self.pipeline, path)
            setattr(parent, attribute, module)
        self.originals, self.layers = {}, {}

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()


class AttachedSubspace(Attached):
    """A subspace on a pipeline, with a blend of its concepts active."""

    def __init__(self, pipeline: Any, subspace: Subspace) -> None:
        self.subspace = subspace
        self.blend = Blend({})
        super().__init__(pipeline, sorted(subspace.layers))
        self.bases = {
            path: cast_update(Update(basis.alpha, (), basis.beta), weight_of(self.layers[path]))
            for path, basis in subspace.layers.items()
        }

    def set_blend(self, blend: Blend | str | Mapping[str, float] | None) -> Blend:
        """Make a blend active, e.g. "watercolor:0.8 + robot:0.5"; None or "" is the untouched base.

        An unknown concept is a ValueError that lists the known ones, and changes nothing.
        """
        if not self.layers:
            raise ValueError("this handle is detached; attach the subspace again")
        chosen = Blend.of(blend)
        cores = self.subspace.blend(chosen.weights)
        self.set({path: [self.update(path, core)] for path, core in cores.items()})
        self.blend = chosen
        return chosen

    def update(self, path: str, core: Any) -> Update:
        """Return one layer's update of a core (k', k), on the layer's device."""
        basis = self.bases[path]
        return core_update(basis.alpha, core.to(basis.alpha), basis.beta)

    def detach(self) -> None:
        super().detach()
        self.bases, self.blend = {}, Blend({})


def attach(pipeline: Any, subspace: Subspace, *, strict: bool = True) -> AttachedSubspace:
    """Wrap the subspace's layers in the pipeline and return the handle; nothing is active until `set_blend`.

    Raises ValueError, with nothing attached, when the pipeline is another base or already carries a subspace.
    `strict=False` allows other weights in the same architecture (a fine-tune of the base, say).
    """
    problems = attach_problems(pipeline, subspace, strict)
    if problems:
        raise ValueError("; ".join(problems))
    return AttachedSubspace(pipeline, subspace)


def attach_problems(pipeline: Any, subspace: Subspace, strict: bool) -> list[str]:
    """Return why a subspace cannot go onto a pipeline."""
    found = layers(pipeline)
    if not subspace.complete:
        return ["this subspace was loaded without its base's weights; load it with Subspace.load(path, weights)"]
    if any(isinstance(module, ShareLayer) for module in found.values()):
        return ["the pipeline already carries attached layers; call detach() on their handle first"]
    grouped = [path for path in subspace.layers if getattr(found.get(path), "groups", 1) != 1]
    if grouped:
        return [f"{', '.join(grouped[:3])} cannot be adapted: convolutions with groups are not supported"]
    absent = [path for path in subspace.layers if path not in found]
    shapes = {
        path: (shape_of(found[path])[0], (basis.beta.shape[0], basis.alpha.shape[0]))
        for path, basis in subspace.layers.items()
        if path in found
    }
    wrong = [f"{path} is {there}, the subspace has {ours}" for path, (there, ours) in shapes.items() if there != ours]
    problems = []
    if absent or wrong:
        name = subspace.base.name or "another one"
        problems.append(
            f"wrong base: the subspace belongs to {name!r}; {len(absent)} of its {len(subspace.layers)} layers are absent"
            f"{' (' + absent[0] + ', ...)' if absent else ''} and {len(wrong)} have another shape"
            f"{' (' + wrong[0] + ')' if wrong else ''}; load that base"
        )
    elif strict and (mismatch := subspace.base.mismatch(identify(pipeline, "this pipeline"))):
        problems.append(f"wrong base: {mismatch}; load that base, or pass strict=False for a fine-tune of it")
    return problems
