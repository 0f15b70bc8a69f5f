"""Facts about the baselines of the continual benchmark: merges, compression, guards against forgetting, the paper's recipe."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from stream.separate import MergedLoRA, average, core, dare, knots, rounded, ties
from stream.shared import PaperStream
from stream.single import SequentialLoRA

from share_diffusion.lora import Factors, LoRA
from share_diffusion.objective import Draw


def updates(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_ties_keeps_agreeing_large_entries_only():
    one, other = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    one[0, 0], other[0, 0] = 4.0, 2.0  # both agree: their mean
    one[0, 1], other[0, 1] = 3.0, -1.0  # the sum elects plus: only the first counts
    one[0, 2] = 2.0
    one[0, 3], other[0, 3] = 1.0, 1.0
    merged = ties({"a": torch.stack([one, other])}, 0)["a"]
    assert merged[0].tolist() == [3.0, 3.0, 2.0, 1.0, 0.0]
    assert not merged[1:].any()


def test_ties_trims_over_all_layers_together():
    merged = ties({"small": updates(2, 10, 10), "large": 100 * updates(2, 5, 10)}, 0)
    assert not merged["small"].any()
    assert 0 < merged["large"].count_nonzero() < 50  # a fifth of 150 entries of either update, some without a common sign


def test_dare_keeps_the_mean_in_expectation():
    matrix = {"a": updates(3, 4, 4)}
    mean = torch.stack([dare(matrix, seed)["a"] for seed in range(1000)]).mean(0)
    assert torch.allclose(mean, average(matrix, 0)["a"], atol=0.15)


@pytest.mark.parametrize("way", [ties, knots, core])
def test_a_merge_of_one_update_is_exact_where_nothing_is_trimmed(way, monkeypatch):
    matrix = updates(1, 6, 5)
    monkeypatch.setattr("stream.separate.DENSITY", 0.1)
    assert not torch.allclose(way({"a": matrix}, 0)["a"], matrix[0], atol=0.1)
    monkeypatch.setattr("stream.separate.DENSITY", 1.0)
    assert torch.allclose(way({"a": matrix}, 0)["a"], matrix[0])


@pytest.mark.parametrize("way", [knots, core])
def test_a_merge_in_a_common_frame_does_not_depend_on_the_space_around_it(way):
    small, isometry = updates(3, 4, 7), torch.linalg.qr(updates(12, 4)).Q
    turned = torch.linalg.qr(updates(20, 7)).Q
    inside = way({"a": small}, 0)["a"]
    assert torch.allclose(way({"a": isometry @ small}, 0)["a"], isometry @ inside)
    wider = way({"a": isometry @ small @ turned.mT}, 0)["a"]
    assert torch.linalg.matrix_rank(wider) <= 4
    if way is core:  # the other side is turned into a frame of its own as well
        assert torch.allclose(wider, isometry @ inside @ turned.mT)


def test_a_merge_takes_the_scale_that_gains_most_on_average_over_the_concepts():
    bench = SimpleNamespace(shapes={"unet.a": ((6, 5), None)})
    stream = MergedLoRA(bench, 0, "average", tried=(0.5, 1.0, 2.0))
    up, down = updates(6, 1).float(), updates(1, 5).float()
    stream.loras = {name: LoRA({"unet.a": Factors(scale * up, down)}) for name, scale in (("style", 1.0), ("subject", 2.0))}
    norm = {name: float(lora.layers["unet.a"].dense().norm()) for name, lora in stream.loras.items()}

    def training_loss(lora, name):
        """A style gains a hundred times what a subject gains; each is best at its own update's norm."""
        height = 10.0 if name == "style" else 0.1
        size = 0.0 if lora is None else float(lora.layers["unet.a"].dense().norm())
        return height * (1 + (size - norm[name]) ** 2 / norm[name] ** 2)

    bench.training_loss = training_loss
    chosen = stream.update("style")
    mean = sum(norm.values()) / 2
    gains = {s: sum(1 - (s * mean - n) ** 2 / n**2 for n in norm.values()) for s in (0.5, 1.0, 2.0)}
    assert float(chosen.layers["unet.a"].dense().norm()) == pytest.approx(max(gains, key=gains.get) * mean, rel=1e-5)
    assert stream.costs() == (22, 0, 44)  # two ranks of 6 + 5


def test_rounding_to_eight_bits_is_off_by_half_a_step_at_most():
    matrix = updates(30, 4)
    step = matrix.abs().amax(0) / 127
    assert bool(((rounded(matrix, 0, 8) - matrix).abs() <= step / 2 + 1e-12).all())


def papers(centred: bool, rank: int) -> tuple[PaperStream, dict[str, LoRA]]:
    """The paper's merge of three LoRAs of rank 2 on one layer of 12 x 10, without a model."""
    stream = PaperStream.__new__(PaperStream)
    stream.rank, stream.centred, stream.bases, stream.concepts = rank, centred, {}, {}
    loras = {
        name: LoRA({"unet.a": Factors(updates(3, 12, 2)[index].float(), updates(3, 2, 10)[index].float())})
        for index, name in enumerate("abc")
    }
    for name, lora in loras.items():
        stream.merge(name, lora)
    return stream, loras


def test_the_papers_merge_is_exact_with_room_and_lossy_when_centred_or_cut():
    def error(centred: bool, rank: int) -> float:
        stream, loras = papers(centred, rank)
        pairs = [(stream.update(name).layers["unet.a"].dense(), lora.layers["unet.a"].dense()) for name, lora in loras.items()]
        return max(float((kept - true).norm() / true.norm()) for kept, true in pairs)

    assert error(centred=False, rank=6) < 1e-5
    assert error(centred=True, rank=5) > 0.05  # six directions, of which centring leaves five
    assert error(centred=False, rank=3) > 0.05


class Bench(SimpleNamespace):
    """As much of a workbench as a guard looks at: one linear layer, two concepts of 20 pictures, a batch of 8."""

    def __init__(self) -> None:
        training = SimpleNamespace(batch=8, rank=2, rate=1e-2, lora_rate=4e-3)
        modules = {"unet.a": torch.nn.Linear(5, 6, bias=False)}
        super().__init__(plan=SimpleNamespace(training=training), modules=modules, device=torch.device("cpu"))

    def materials(self, *parts):
        """Return one entry a picture, told by its concept."""
        return [name for name, count in parts for _ in range(count or 20)]

    def lessons(self, concept, seed):
        """Return batches of the concept's own pictures."""
        return lambda step: (None, Draw(torch.arange(8) + step, torch.zeros(8), torch.zeros(8, 1, 1, 1)))


def guarded(guard: str, **options) -> SequentialLoRA:
    """A stream that has learned one concept."""
    stream = SequentialLoRA(Bench(), 0, guard, **options)
    stream.lora = LoRA({"unet.a": Factors(updates(6, 2).float(), updates(2, 5).float())})
    stream.concepts = ["first"]
    return stream


def test_ewc_holds_every_number_where_it_was_by_what_it_mattered():
    stream = guarded("ewc", strength=0.5)
    learner = stream.continued()
    stream.fisher = {name: 1 + torch.arange(float(p.numel())).view_as(p) for name, p in learner.named_parameters()}
    penalty = stream.penalty(learner)
    assert penalty(learner).item() == 0
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 0.1
    weighed = sum(float(fisher.sum()) for fisher in stream.fisher.values())
    assert penalty(learner).item() == pytest.approx(0.5 * 0.01 * weighed, rel=1e-4)


def test_c_lora_starts_at_the_sum_of_the_earlier_and_keeps_off_what_they_changed():
    stream = guarded("c_lora", strength=3.0)
    learner, past = stream.beside(), stream.lora.layers["unet.a"].dense()
    penalty = stream.penalty(learner)
    assert torch.equal(learner.lora().layers["unet.a"].dense(), past)  # a new LoRA changes nothing
    assert penalty(learner).item() == 0
    (_, new), trained = learner.by_layer()["unet.a"], list(learner.parameters())
    assert sorted(map(id, trained)) == sorted([id(new.alpha), id(new.beta)])  # the earlier ones are frozen
    with torch.no_grad():
        new.beta += 1
    change = new.beta @ new.alpha.mT
    asked = 3.0 * (past.abs() / past.abs().max() * change).square().sum()
    assert penalty(learner).item() == pytest.approx(asked.item(), rel=1e-5)


def test_replay_gives_half_of_every_batch_to_kept_pictures_of_earlier_concepts():
    stream = guarded("replay", kept=4)
    stream.concepts = ["first", "second"]
    batches, seen = stream.batches("third"), set()
    for step in range(40):
        data, drawn = batches(step)
        assert len(data) == 20 + 4 + 4
        assert drawn.indices[:4].tolist() == [step, step + 1, step + 2, step + 3]  # the new concept's
        seen |= {(data[index], index) for index in drawn.indices[4:].tolist()}
    assert {index for _, index in seen} == set(range(20, 28))
    assert {name for name, _ in seen} == {"first", "second"}


def test_without_a_guard_nothing_is_added_and_no_picture_is_kept():
    stream = guarded("none")
    learner = stream.continued()
    assert stream.penalty(learner) is None
    assert torch.equal(learner.lora().layers["unet.a"].dense(), stream.lora.layers["unet.a"].dense())
    assert stream.batches("second")(3)[1].indices.tolist() == list(range(3, 11))
