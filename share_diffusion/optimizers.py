"""Optimizers by name: torch's own, others where they are installed, and any class as `module:Class`.

Nothing beyond torch is needed; what is not installed is told by its package's name. Arguments come as `name=value` words
and reach the optimizer as Python values.

AdamW decays what trains, by as much over a whole run whatever its rate and length (`decay_for`). Coefficients in columns that
nobody chose carry noise beside what they learn, and the decay seems to take mostly the noise: held-out loss falls while
training loss does not. A decay that is the same in every step is too much for long runs
(tests/benchmarks/results/continual/notes.md has the figures).
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

RATE = 2e-2  # of coefficients
FACTOR_RATE = 1.6e-2  # of temporary factors
LORA_RATE = 2e-3  # of ordinary LoRAs: they are the ones that a high rate throws off
SHRINK = 2.4  # rate x decay x steps: over a run at a steady rate, what the loss does not ask for shrinks by exp(-SHRINK)
FREE = ("prodigy",)  # find their rate by themselves, as a factor of one rate that all groups have
DECAYING = ("adamw", "adamw8bit")  # with a decay of their own where the arguments name none

KNOWN = {
    "adamw": ("torch.optim:AdamW", {"betas": (0.9, 0.99)}, "torch"),
    "adam": ("torch.optim:Adam", {"betas": (0.9, 0.99)}, "torch"),
    "sgd": ("torch.optim:SGD", {"momentum": 0.9}, "torch"),
    "adafactor": ("transformers.optimization:Adafactor", {"scale_parameter": False, "relative_step": False}, "transformers"),
    "adamw8bit": ("bitsandbytes.optim:AdamW8bit", {"betas": (0.9, 0.99)}, "bitsandbytes"),
    "prodigy": ("prodigyopt:Prodigy", {"weight_decay": 0.0}, "prodigyopt"),
    "lion": ("lion_pytorch:Lion", {"weight_decay": 0.0}, "lion-pytorch"),
}


def make_optimizer(
    name: str, groups: Iterable[Mapping[str, Any]], arguments: Sequence[str] = (), steps: int | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of a run of so many steps; without `steps`, AdamW has torch's own decay of 0.01.

    Raises ValueError for an unknown name, a package that is absent or an argument that the optimizer lacks.
    """
    key, groups = name.lower().replace("_", ""), [dict(group) for group in groups]
    path, defaults, package = KNOWN.get(key, (name, {}, name.partition(".")[0].partition(":")[0]))
    kind = find_class(name, path, package)
    if steps and key in DECAYING:
        defaults = {**defaults, "weight_decay": decay_for(max((group["lr"] for group in groups), default=RATE), steps)}
    chosen = {**defaults, **dict(parse_argument(word) for word in arguments)}
    accepted = inspect.signature(kind).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if unknown := [word for word in chosen if word not in accepted and not open_ended]:
        takes = ", ".join(word for word in accepted if word not in ("self", "params"))
        raise ValueError(f"optimizer {name} takes no {', '.join(unknown)}; it takes {takes}")
    if callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None)):
        raise ValueError(f"optimizer {name} switches between weights to train and weights to use, which is not supported; "
                         "for averaged weights give another optimizer and --ema_decay 0.99")  # fmt: skip
    try:
        return kind(groups, **chosen)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"optimizer {name} with {' '.join(arguments) or 'no arguments'}: {error}") from error


def decay_for(rate: float, steps: int) -> float:
    """Return AdamW's weight decay for a rate and a number of steps: 1 / (rate x decay) is the same part of every run.

    That timescale, and not the decay itself, is what carries over between rates and lengths (Wang and Aitchison 2024,
    arXiv 2405.13698). A step takes at most half.
    """
    return min(SHRINK / steps, 0.5) / rate if 0 < rate < float("inf") else 0.0


def find_class(name: str, path: str, package: str) -> Any:
    """Return the class at `module:Class`."""
    module, _, attribute = path.partition(":")
    if not attribute:
        raise ValueError(f"optimizer {name!r} is not known; known are {', '.join(KNOWN)}, or give module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"optimizer {name} needs {package}, which is not installed: pip install {package}") from error
    except AttributeError:
        raise ValueError(f"optimizer {name!r}: {module} has no {attribute}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer {name!r}: {error}; give module:Class") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {name!r} is no torch.optim.Optimizer; give the class of one")
    return found


def parse_argument(word: str) -> tuple[str, Any]:
    """Return the name and value of `weight_decay=0.01`."""
    name, equals, text = word.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"optimizer argument {word!r} is not name=value, as in weight_decay=0.01")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text


class Average:
    """An exponential moving average of what trains; the decay is lower in the first steps, (1 + n) / (10 + n)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay is {decay}; it is above 0 and below 1, 0.99 is usual for short runs")
        self.decay, self.steps = decay, 0
        self.values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present values."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in module.named_parameters():
            self.values[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> dict[str, Tensor]:
        """Put the averages into the module and return the values that they replace."""
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])
        return before

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"steps": self.steps, "values": deepcopy(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint held."""
        self.steps = state["steps"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])
