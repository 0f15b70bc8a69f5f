"""Out to other programs: a concept or a blend as a LoRA, a fused pipeline, a single-file checkpoint or a ComfyUI folder.

    from share_diffusion.export import export

    export(subspace, "watercolor:0.8 + robot:0.5", "blend.safetensors")

Everything is folded in float32, checked against the range of half precision, written whole or not at all, and then held
against the key maps of the programs that will read it (`readers/`).
"""

from share_diffusion.export.formats import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
