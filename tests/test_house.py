"""Rules of the house that a machine can keep: who may import whom, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import share_diffusion

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "share_diffusion"
BOTTOM = {"basis", "capacity", "concept", "container", "storage", "merge", "subspace", "file", "blend", "layer"}
BOTTOM |= {"grammar", "cores", "methods", "regions", "active"}


def imports(path):
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_importing_the_library_loads_nothing_heavy():
    code = (
        "import sys, share_diffusion; print([m for m in ('torch', 'diffusers', 'transformers', 'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_bottom_knows_no_model():
    for name in BOTTOM:
        known = imports(LIBRARY / f"{name}.py")
        assert not {module for module in known if module.split(".")[0] in ("diffusers", "transformers", "accelerate", "gradio")}
        assert not {module for module in known if module.startswith("share_diffusion.models")}, name


def test_accelerate_and_gradio_stay_in_their_rooms():
    for path in LIBRARY.rglob("*.py"):
        assert not {module for module in imports(path) if module.split(".")[0] in ("accelerate", "gradio", "train", "app")}, (
            path
        )


def test_the_library_prints_only_from_the_command_line():
    for path in LIBRARY.rglob("*.py"):
        if path.name == "__main__.py" or path.parent.name == "commands":
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path


def test_no_public_name_is_hidden_by_a_module():
    modules = {path.stem for path in LIBRARY.glob("*.py")} | {path.name for path in LIBRARY.iterdir() if path.is_dir()}
    assert not modules & set(share_diffusion.__all__)


def test_the_page_and_the_training_scripts_do_not_know_each_other():
    for room, other in (("app", "train"), ("train", "app")):
        for path in (ROOT / room).rglob("*.py"):
            known = {module.split(".")[0] for module in imports(path)}
            assert not known & {other, "gradio" if room == "train" else "accelerate"}, path


def test_the_page_itself_knows_no_model():
    for path in (ROOT / "app").glob("*.py"):
        known = {module.split(".")[0] for module in imports(path)}
        assert not ("gradio" in known and known & {"torch", "diffusers", "transformers"}), path
