"""Facts about learning from a script of one's own: the pipeline is left as it was, and what is learned is what was merged."""

import math

import pytest
import torch
from PIL import Image

from share_diffusion.adapt import START, Adaptation, make_learner
from share_diffusion.attached import attach
from share_diffusion.base import load_base
from share_diffusion.basis import Basis
from share_diffusion.loop import adapt
from share_diffusion.optimizers import FACTOR_RATE, LORA_RATE, RATE, SHRINK, Average, decay_for, make_optimizer


@pytest.fixture
def photos(tmp_path):
    for number in range(2):
        Image.new("RGB", (70, 70), (90 * number, 60, 200)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_adapt_learns_beside_what_is_there_and_leaves_the_pipeline_as_it_was(photos, one_thread):
    pipeline = load_base("tiny")
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    asked = [parameter.requires_grad for parameter in pipeline.unet.parameters()]
    few = {"steps": 2, "batch": 2, "targets": "attn2", "train_text_encoder": False}
    told = []
    one = adapt(pipeline, photos, name="sky", instance_prompt="a sky", progress=lambda *facts: told.append(facts), **few)
    two = adapt(pipeline, photos, name="sea", instance_prompt="a sea", kind="subject", subspace=one, **few)
    assert [step for step, _ in told] == [1, 2]
    assert list(two.concepts) == ["sky", "sea"]
    assert two["sea"].kind == "subject"
    assert all(concept.half_weight is None or 0 < concept.half_weight <= 1 for concept in two.concepts.values())
    for layer, entry in one["sky"].coefficients.items():
        assert torch.equal(entry.alpha, two["sky"].coefficients[layer].alpha)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
    assert [parameter.requires_grad for parameter in pipeline.unet.parameters()] == asked
    with attach(pipeline, two) as handle:
        handle.set_blend("sea")
    again = adapt(load_base("tiny"), photos, name="sky", instance_prompt="a sky", **few)
    assert torch.equal(again["sky"].coefficients[layer].alpha, one["sky"].coefficients[layer].alpha)


def test_adapt_says_what_is_wrong(photos):
    pipeline = load_base("tiny")
    with pytest.raises(ValueError, match="have no caption"):
        adapt(pipeline, photos, name="sky", steps=1)
    with pytest.raises(ValueError, match="loss is not finite at step"):
        adapt(
            pipeline, photos, name="sky", instance_prompt="a sky", steps=3, batch=1, targets="attn2.to_q",
            train_text_encoder=False, adaptation=Adaptation("lora"), factor_learning_rate=float("inf"),
        )  # fmt: skip


class Averaging(torch.optim.SGD):
    """Switches between weights to train and weights to use, as schedule-free optimizers do."""

    def train(self):
        pass

    def eval(self):
        pass


@pytest.mark.parametrize(("rate", "steps"), [(RATE, 120), (RATE, 400), (2e-2, 1000), (4e-3, 120)])
def test_over_a_run_decay_takes_the_same_part_of_what_the_loss_does_not_ask_for(rate, steps):
    coefficients = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make_optimizer("adamw", [{"params": [coefficients], "lr": rate}], steps=steps)
    for _ in range(steps):
        coefficients.grad = torch.zeros_like(coefficients)
        optimizer.step()
    assert torch.allclose(coefficients, torch.full_like(coefficients, math.exp(-SHRINK)), rtol=SHRINK**2 / steps)


def test_a_decay_that_is_given_is_taken_and_few_steps_take_at_most_half_each():
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": RATE},
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 2e-3},
    ]
    assert make_optimizer("adamw", groups, ["weight_decay=0.25"], 400).defaults["weight_decay"] == 0.25
    assert make_optimizer("adamw", groups, steps=400).defaults["weight_decay"] == pytest.approx(0.3)
    assert decay_for(RATE, 1) == pytest.approx(0.5 / RATE)
    assert decay_for(0.0, 100) == decay_for(float("inf"), 100) == 0.0


def test_coefficients_start_small_in_columns_that_are_frozen_and_at_norm_one_in_those_that_train():
    module = torch.nn.Linear(400, 300)
    basis = Basis(torch.eye(400, 200), torch.eye(300, 200))
    for mode, norm in (("coefficients", START), ("temporary", 1.0)):
        learner = make_learner({"layer": module}, {"layer": basis}, Adaptation(mode, 4, 200), {}, seed=0)
        (path,) = learner.by_layer()["layer"]
        assert torch.allclose(path.coefficients_alpha.norm(dim=0), torch.tensor(norm), rtol=0.2)
        assert not path.coefficients_beta.any()


def test_every_kind_of_what_trains_has_its_rate():
    """Coefficients, temporary factors and LoRAs differ; one rate given for factors is that of LoRAs too."""
    modules = {name: torch.nn.Linear(20, 30) for name in ("unet.a", "text_encoder.b")}
    basis = Basis(torch.eye(20, 6), torch.eye(30, 6))

    def rates(mode, bases, *given):
        learner = make_learner(modules, bases, Adaptation(mode), {}, seed=0)
        names = {id(parameter): name for name, parameter in learner.named_parameters()}
        groups = learner.parameter_groups(*given)
        found = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
        assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
        return {
            ("text " if "text_encoder" in name else "") + ("coefficients" if "coefficients" in name else "factors"): rate
            for name, rate in found.items()
        }

    bases = dict.fromkeys(modules, basis)
    assert rates("coefficients", bases) == {"coefficients": RATE, "text coefficients": RATE}
    factors = {"factors": FACTOR_RATE, "text factors": FACTOR_RATE}
    assert rates("temporary", bases) == {"coefficients": RATE, "text coefficients": RATE, **factors}
    assert rates("lora", bases) == rates("temporary", {}) == {"factors": LORA_RATE, "text factors": LORA_RATE}
    assert rates("coefficients", bases, 0.0, None, 0.01) == {"coefficients": 0.0, "text coefficients": 0.01}
    assert rates("lora", bases, 0.5, 0.25) == {"factors": 0.25, "text factors": 0.25}
    assert rates("temporary", bases, 0.5, 0.25, 0.05) == {
        "coefficients": 0.5,
        "factors": 0.25,
        "text coefficients": 0.05,
        "text factors": pytest.approx(0.025),
    }


def test_optimizers_are_found_by_name_or_path_and_refuse_what_they_lack():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 0.1}]
    assert type(make_optimizer("AdamW", groups)).__name__ == "AdamW"
    assert make_optimizer("AdamW", groups).defaults["betas"] == (0.9, 0.99)
    assert make_optimizer("torch.optim:Adagrad", groups, ["lr_decay=0.5"]).defaults["lr_decay"] == 0.5
    for name, arguments, expected in (
        ("adamw", ["weight=1"], "takes no weight; it takes lr"),
        ("adamw", ["weight_decay"], "is not name=value"),
        ("nothing", [], "known are adamw"),
        ("torch.optim:Nothing", [], "torch.optim has no Nothing"),
        ("adamw8bit", [], "pip install bitsandbytes"),
        ("mine.own:Thing", [], "pip install mine"),
        (f"{__name__}:Averaging", [], "not supported; for averaged weights .* --ema_decay"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_optimizer(name, groups, arguments)


def test_the_average_follows_and_is_put_back():
    layer = torch.nn.Linear(2, 2, bias=False)
    average = Average(layer, 0.5)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    average.update(layer)
    decay = 2 / 11  # min(0.5, (1 + 1) / (10 + 1))
    before = average.copy_to(layer)
    assert torch.allclose(layer.weight, start + (1 - decay))
    assert torch.allclose(before["weight"], start + 1.0)
    other = Average(layer, 0.5)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.values["weight"], average.values["weight"])
