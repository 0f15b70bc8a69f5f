"""Share for ComfyUI: concepts of a subspace file as nodes. Copy or link this folder into `ComfyUI/custom_nodes/`.

Subspace files go into `ComfyUI/models/share/`. Nothing but torch and safetensors is needed, which ComfyUI has.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
