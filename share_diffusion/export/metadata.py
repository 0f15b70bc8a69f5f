"""What an exported file says about itself: kohya's `ss_*` keys, ModelSpec 1.0.1, and the sidecar of A1111.

All values are text. Nothing here depends on the day or the machine, so the same blend is the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from share_diffusion.blend import Blend
from share_diffusion.export.family import Family
from share_diffusion.subspace import Subspace

THUMBNAIL_SIDE = 256


@dataclass(frozen=True)
class About:
    """What is said of an export: its title, the blend it holds, and what its concepts bring along.

    `prediction` is ModelSpec's word for what the base predicts, '' where the base is not at hand to tell.
    """

    title: str
    blend: Blend
    family: Family
    triggers: tuple[str, ...] = ()
    licence: str = ""
    base: str = ""
    rank: int = 0
    error: float = 0.0
    prediction: str = ""

    @property
    def trigger(self) -> str:
        """The words that call all concepts, in the order of the blend."""
        return ", ".join(self.triggers)


def acting(blend: Blend) -> list[str]:
    """Return the concepts that a blend holds: those with a term of a weight other than 0, though their sum may be 0."""
    return list(dict.fromkeys(term.name for term in blend.terms if term.weight))


def about(subspace: Subspace, blend: Blend, family: Family, title: str, prediction: str = "") -> About:
    """Return what is known of a blend of a subspace's concepts; a concept of weight 0 is not part of it."""
    concepts = [subspace[name] for name in acting(blend)]
    triggers = dict.fromkeys(concept.trigger for concept in concepts if concept.trigger)
    licences = dict.fromkeys(str(concept.details["license"]) for concept in concepts if concept.details.get("license"))
    said = " AND ".join(licences)
    return About(title, blend, family, tuple(triggers), said, subspace.base.name, prediction=prediction)


def lora_metadata(about: About, picture: Image.Image | None = None) -> dict[str, str]:
    """Return the metadata of a LoRA file; what ranks and scale are is added when it is written."""
    family = about.family
    found = {
        "ss_base_model_version": family.kohya,
        "ss_v2": str(family.kohya.startswith("sd_v2")) if family.kohya else "",
        "ss_sd_model_name": about.base,
        "ss_network_args": "{}",
        **modelspec(about, f"{family.modelspec}/lora" if family.modelspec else "", picture),
    }
    return {key: value for key, value in found.items() if value}


def modelspec(about: About, architecture: str, picture: Image.Image | None = None) -> dict[str, str]:
    """Return the ModelSpec keys of an export of this architecture, those without a value left out."""
    family = about.family
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": family.implementation,
        "title": about.title,
        "resolution": f"{family.resolution}x{family.resolution}" if family.resolution else "",
        "prediction_type": about.prediction,
        "description": f"Share blend: {about.blend}" if about.blend.weights else "",
        "trigger_phrase": about.trigger,
        "usage_hint": usage_hint(about),
        "merged_from": ", ".join(acting(about.blend)),
        "license": about.licence,
        "thumbnail": data_url(picture) if picture is not None else "",
    }
    return {f"modelspec.{key}": value for key, value in fields.items() if value}


def usage_hint(about: About) -> str:
    """Return one sentence on how the export is used."""
    words = f"Write {about.trigger!r} in the prompt. " if about.trigger else ""
    return f"{words}Weight 1.0 is the blend as it was made." if about.rank else words.strip()


def data_url(picture: Image.Image) -> str:
    """Return a small JPEG as the text that ModelSpec asks for."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def sidecar(about: About) -> str:
    """Return the JSON that A1111 and Forge read beside a LoRA of the same stem."""
    content: dict[str, Any] = {
        "description": f"Share blend: {about.blend}",
        "sd version": about.family.sidecar,
        "activation text": about.trigger,
        "preferred weight": 1.0,
        "notes": "".join([usage_hint(about), f" Licence: {about.licence}." if about.licence else ""]),
    }
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


def body_hash(path: Path) -> str:
    """Return the SHA-256 of a safetensors file behind its header, which is how kohya and ModelSpec count."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def hashes(path: Path) -> Mapping[str, str]:
    """Return the metadata that tells the tensors of a file."""
    digest = body_hash(path)
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
