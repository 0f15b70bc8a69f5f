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
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from share_diffusion.active import Active, Moment
from share_diffusion.blend import Blend
from share_diffusion.cores import CoreTable, frame, narrow
from share_diffusion.layer import ShareLayer, Update, cast_update, wrap
from share_diffusion.models.blocks import block_groups, blocks_of, sees_text
from share_diffusion.models.calls import caller, order_of_samples, progress, read_call
from share_diffusion.models.identity import identify, precision_of, weight_of
from share_diffusion.models.layers import components, layers, parent_of, shape_of
from share_diffusion.regions import Field, read_mask
from share_diffusion.subspace import BaseIdentity, Subspace

TEXT, DENOISER = "text_encoder", "denoiser"


class Attached:
    """Wrapped layers of a pipeline, by path; `set` makes updates active, `detach` puts the originals back."""

    def __init__(self, pipeline: Any, paths: Sequence[str]) -> None:
        found = layers(pipeline)
        self.pipeline = pipeline
        self.originals: dict[str, nn.Module] = {path: found[path] for path in paths}
        self.places = {path: parent_of(pipeline, path) for path in paths}
        self.layers: dict[str, ShareLayer] = {}
        try:
            for path, module in self.originals.items():
                parent, attribute = self.places[path]
                self.layers[path] = wrap(module)
                self.layers[path].train(module.training)
                setattr(parent, attribute, self.layers[path])
        except BaseException:
            Attached.detach(self)
            raise

    def set(self, updates: Mapping[str, Sequence[Update]]) -> None:
        """Make these updates active, and no others."""
        for path, layer in self.layers.items():
            layer.set(updates.get(path, ()))

    def detach(self) -> None:
        """Put the original layers back where they were, whatever the pipeline holds by now; harmless when done twice."""
        for path, module in self.originals.items():
            parent, attribute = self.places[path]
            setattr(parent, attribute, module)
        self.originals, self.places, self.layers = {}, {}, {}

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()


class AttachedSubspace(Attached):
    """A subspace on a pipeline, with a blend of its concepts active, or one for every sample of a batch."""

    def __init__(self, pipeline: Any, subspace: Subspace) -> None:
        self.subspace = subspace
        self.blends = [Blend()]
        self.hooks: list[RemovableHandle] = []
        super().__init__(pipeline, sorted(subspace.layers))
        try:
            self.bases = {
                path: cast_update(
                    Update(basis.alpha, (), basis.beta), weight_of(self.layers[path]), precision_of(self.layers[path])
                )
                for path, basis in subspace.layers.items()
            }
        except BaseException:  # the device may be full
            super().detach()
            raise
        self.table = CoreTable(subspace, block_groups(subspace.layers, blocks_of(layers(pipeline))))
        self.active = Active(self.blends, self.table, {})
        self.shown: dict[str, tuple[Moment, tuple[int, ...] | None]] = {}
        self.field: Field | None = None

    @property
    def blend(self) -> Blend:
        """The active blend (the first sample's where each has its own)."""
        return self.blends[0]

    def set_blend(self, blend: Blend | str | Mapping[str, float] | None, *, masks: Mapping[str, Any] | None = None) -> Blend:
        """Make a blend active, e.g. "watercolor:0.8 + robot:0.5"; None or "" is the untouched base.

        `masks` are the pictures (or tensors of 0 to 1) of its regions `@name`. An unknown concept, block group or mask is
        a ValueError that lists the known ones, and changes nothing.
        """
        return self.set_blends([blend], masks=masks)[0]

    def set_blends(
        self, blends: Sequence[Blend | str | Mapping[str, float] | None], *, masks: Mapping[str, Any] | None = None
    ) -> list[Blend]:
        """Make one blend per sample active: draw with as many prompts, in a list (and negative prompts, if any, as well)."""
        if not self.layers:
            raise ValueError("this handle is detached; attach the subspace again")
        if isinstance(blends, str) or not blends:
            raise ValueError(f"blends are {blends!r}; give a list, one for every sample")
        chosen = [Blend.of(blend) for blend in blends]
        pictures = {name: read_mask(name, picture) for name, picture in (masks or {}).items()}
        active, before = Active(chosen, self.table, pictures), (self.active, self.blends)
        try:
            self.act(active, chosen)
        except BaseException:  # the device may be full, say
            self.act(*before)
            raise
        return chosen

    def act(self, active: Active, blends: list[Blend]) -> None:
        """Let blends act from the start of a drawing on."""
        self.active, self.blends, self.field, self.shown = active, blends, None, {}
        self.show(TEXT, active.moment(None), None)
        self.show(DENOISER, active.moment(0.0), None)
        self.watch()

    def show(self, part: str, moment: Moment, index: Tensor | None) -> None:
        """Give the layers of the text encoders or of the denoiser what acts at a moment, in the samples' order."""
        key = moment, None if index is None else tuple(index.tolist())
        if self.shown.get(part) == key:
            return
        start, stop = (0, self.table.text) if part == TEXT else (self.table.text, self.table.width)
        cores, acting = self.active.flat(moment, start, stop), self.active.layers(moment)
        rank, updates = self.active.rank, {}
        if moment.regional:
            shares = self.active.shares(moment)
            self.field = Field(moment.columns, self.active.masks, shares)
            words = {path for path in acting if sees_text(path)}
            updates |= self.updates((shares[..., None] * cores).sum(1, keepdim=True), words, rank, index, start)
            updates |= self.updates(cores, acting - words, rank, index, start, self.field)
        else:
            updates |= self.updates(cores, acting, rank, index, start)
        for path, layer in self.layers.items():
            if path.startswith(TEXT) == (part == TEXT):
                layer.set([updates[path]] if path in updates else ())
        self.shown[part] = key

    def updates(
        self,
        cores: Tensor,
        acting: set[str],
        rank: int | None,
        index: Tensor | None,
        start: int,
        where: Field | None = None,
    ) -> dict[str, Update]:
        """Return the updates of some layers from cores (S, C, N), on the layers' devices and in their precision.

        What all samples and places share of their cores is multiplied into the bases here, once, so that a layer's tokens
        go through few columns (`rank`, a bound on all cores together) and not through all that its bases have.
        """
        if len(cores) > 1 and index is not None:
            cores = cores[index]
        single = cores.shape[:2] == (1, 1)  # then the other factor goes into the other base
        flat, factor = (cores[0, 0], narrow) if single else (cores, frame)
        found: dict[str, Update] = {}
        for paths, *factors in self.table.factored(flat, acting, rank, start, factor):
            alphas = {(alpha.dtype, alpha.device): alpha for alpha in (self.bases[path].alpha for path in paths)}
            cast = {kind: [None if side is None else side.to(like) for side in factors] for kind, like in alphas.items()}
            for place, path in enumerate(paths):
                base = self.bases[path]
                sides = cast[base.alpha.dtype, base.alpha.device]
                left, rest = (None if side is None else side[..., place, :, :] for side in sides)
                if single or rest is None:
                    found[path] = folded(base, left, rest)
                else:
                    middle = rest.flatten(1, 2)
                    several = middle if len(middle) > 1 else middle[0]
                    found[path] = replace(folded(base, left, None), middle=(several,), where=where)
        return found

    def watch(self) -> None:
        """Follow the pipeline's calls where the blends depend on them: on the step, the picture's shape or the sample."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, several = [], len(self.blends) > 1
        before_text: Any = torch.compiler.disable(self.before_text)
        before_denoiser: Any = torch.compiler.disable(self.before_denoiser)
        for name in components(self.pipeline):
            module = getattr(self.pipeline, name)  # what is called: hooks inside of what is compiled may be passed over
            if name.startswith(TEXT) and several:
                self.hooks.append(module.register_forward_pre_hook(before_text, with_kwargs=True))
            elif not name.startswith(TEXT) and (several or self.active.changing or self.active.regional):
                self.hooks.append(module.register_forward_pre_hook(before_denoiser, with_kwargs=True))

    def before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put the samples' blends in the order of a text encoder's batch."""
        ids = args[0] if args else kwargs["input_ids"]
        moment = self.active.moment(None)
        if any(path.startswith(TEXT) for path in self.active.layers(moment)):
            self.show(TEXT, moment, order_of_samples(None, len(self.blends), len(ids)))

    def before_denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the denoiser's layers what acts at the step, for the samples and the picture's shape of a call."""
        call = read_call(module, args, kwargs)
        several = len(self.blends) > 1
        drawing = caller(self.pipeline, module)
        index = order_of_samples(drawing, len(self.blends), call.samples) if several else None
        moment = self.active.moment(progress(drawing, call.time) if self.active.changing else 0.0)
        self.show(DENOISER, moment, index)
        if moment.regional and self.field is not None:
            self.field.frame(call.grids, call.words, index)

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        super().detach()
        self.hooks, self.bases, self.blends = [], {}, [Blend()]
        self.active, self.field, self.shown = Active(self.blends, self.table, {}), None, {}


def folded(basis: Update, left: Tensor | None, right: Tensor | None) -> Update:
    """Return a basis with a core's factors left (k, r) and right (r, k') multiplied into its sides; None is the identity.

    The input side is laid out by columns: CPU libraries multiply tokens by a few such columns faster.
    """
    alpha = basis.alpha if left is None else (left.mT @ basis.alpha.mT).mT
    return Update(alpha, (), basis.beta if right is None else basis.beta @ right.mT)


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
    if any(f"{path}.base_layer" in found for path in absent):
        return [
            "the pipeline carries a LoRA of diffusers; call unload_lora_weights(), or fuse_lora() and unload_lora_weights()"
        ]
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
    elif strict:
        problems += strict_problems(subspace, identify(pipeline, "this pipeline"))
    return problems


def strict_problems(subspace: Subspace, base: BaseIdentity) -> list[str]:
    """Return why a base whose layers fit is not the subspace's own."""
    if mismatch := subspace.base.mismatch(base):
        return [f"wrong base: {mismatch}; load that base, or pass strict=False for a fine-tune of it"]
    if subspace.origin.kind == "weights" and subspace.base.is_rounded(base):
        return [
            "the subspace's columns come from the base's weights, and this pipeline's are rounded otherwise than those were; "
            "load the base in float32 or float16 (--precision)"
        ]
    return []
