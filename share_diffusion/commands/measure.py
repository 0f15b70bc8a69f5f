"""Begin a subspace file with columns measured on its base: which directions the base's own layers use."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "begin a subspace file with columns measured on its base"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, help="the file to begin")
    parser.add_argument("--pretrained_model_name_or_path", "--base", default="tiny", help="the base (default: tiny)")
    parser.add_argument("--local_files_only", action="store_true")
    parser.add_argument("--device", help="where the base runs (default: a GPU where there is one)")
    parser.add_argument(
        "--targets", default="attention+ff+conv", help="layers that concepts will change (default: %(default)s)"
    )
    parser.add_argument("--no-train_text_encoder", dest="train_text_encoder", action="store_false")
    parser.add_argument("--derived_rank", type=int, default=48, help="columns a side on average (default: %(default)s)")
    parser.add_argument("--resolution", type=int, help="side of the pictures that it draws (default: the base's own)")
    parser.add_argument("--pictures", type=int, help="how many it draws (default: 32)")
    parser.add_argument("--draws", type=int, help="how many it is shown in each of two passes (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="how many at once (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="float32", help="of the base (default: %(default)s)"
    )
    parser.add_argument(
        "--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="what it predicts, where its config is wrong"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory for more time")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    """Draw pictures with the base, measure its layers on them, and write the empty file."""
    if arguments.file.exists():
        raise ValueError(f"{arguments.file} is there already; its columns stay as they are: choose another file")
    if not arguments.file.parent.is_dir():
        raise ValueError(f"{arguments.file.parent} is not a folder; create it first")
    if arguments.derived_rank < 1:
        raise ValueError(f"--derived_rank is {arguments.derived_rank}; at least 1 column is needed")
    import torch
    from tqdm import tqdm

    from share_diffusion.base import base_name, load_base
    from share_diffusion.calibration import Survey, begin, shipped
    from share_diffusion.commands.generate import dtype_of
    from share_diffusion.memory import checkpoint_gradients
    from share_diffusion.models.layers import select
    from share_diffusion.subspace import Origin

    asked = {key: getattr(arguments, key) for key in ("pictures", "draws") if getattr(arguments, key) is not None}
    survey = Survey(**asked, batch=arguments.batch, resolution=arguments.resolution)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = arguments.pretrained_model_name_or_path
    dtype = dtype_of(arguments.precision)
    pipeline = load_base(name, dtype=dtype, device=device, local_files_only=arguments.local_files_only)
    if arguments.prediction_type:
        pipeline.scheduler.register_to_config(prediction_type=arguments.prediction_type)
    if arguments.gradient_checkpointing:
        checkpoint_gradients(pipeline)
    modules = select(pipeline, arguments.targets, arguments.train_text_encoder)
    origin = Origin("activations", arguments.derived_rank, arguments.seed)
    if shipped(pipeline, modules, origin):
        if asked:
            words = " and ".join(f"--{key} {value}" for key, value in asked.items())
            raise ValueError(f"the columns of {base_name(name)} come with the package and nothing is drawn; leave out {words}")
        moot = f"; --resolution {arguments.resolution} has no say in them" if arguments.resolution else ""
        print(f"the columns of {base_name(name)} come with the package: nothing has to be measured{moot}")
    else:
        print(f"{base_name(name)} draws {survey.pictures} pictures of its own; then {len(modules)} of its layers are measured")
    with tqdm(desc="measuring", unit="pass", disable=None) as bar:

        def progress(done: int, whole: int) -> None:
            bar.total = whole
            bar.update(done - bar.n)

        begun = begin(arguments.file, pipeline, modules, origin, base_name(name), survey, progress)
    assert begun.origin.principal is not None
    columns = sum(sum(begun.origin.principal.widths(path)) for path in modules)
    print(
        f"{arguments.file}: {arguments.file.stat().st_size:,} bytes, {columns:,} columns over {2 * len(modules)} sides; "
        "concepts that are learned into it change neither them nor each other"
    )
