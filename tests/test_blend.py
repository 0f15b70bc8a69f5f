"""Facts about blends: how they are written, and that they are exact linear combinations of updates."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_diffusion.blend import METHODS, PLACES, Blend, Method, Region, Steps, Term
from share_diffusion.capacity import Capacity
from share_diffusion.concept import FORBIDDEN, check_name
from share_diffusion.grammar import read_prompt, tags
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Subspace

LAYERS = {"unet.a": (9, 7), "unet.b": (6, 8)}


def draw(seed: int, layers: tuple[str, ...] = tuple(LAYERS), rank: int = 2) -> LoRA:
    """A random LoRA."""
    generator = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            layer: Factors(*(torch.randn(*size, generator=generator) for size in ((out, rank), (rank, width))))
            for layer, (out, width) in ((layer, LAYERS[layer]) for layer in layers)
        }
    )


def refusal(action: Callable[[], object]) -> str:
    """The message of the ValueError that an action must raise."""
    with pytest.raises(ValueError) as caught:
        action()
    return str(caught.value)


# As written


def is_name(text: str) -> bool:
    """Whether a text may be a concept's name."""
    try:
        return check_name(text) == text
    except ValueError:
        return False


letters = st.characters(exclude_characters=FORBIDDEN, exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn"))
names = st.text(letters, min_size=1, max_size=12).map(lambda text: unicodedata.normalize("NFC", text)).filter(is_name)
weights = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(names, weights, max_size=5))
def test_what_is_written_reads_as_the_same_blend(blend: dict[str, float]) -> None:
    again = Blend.parse(str(Blend(blend)))
    assert list(again.weights.items()) == list(blend.items())  # in order, to the last bit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("   ", {}),
        ("watercolor", {"watercolor": 1.0}),
        ("watercolor:0.8 + robot:0.5", {"watercolor": 0.8, "robot": 0.5}),
        ("a:-0.3", {"a": -0.3}),
        ("a:+0.3", {"a": 0.3}),
        ("a:.5+b:2.", {"a": 0.5, "b": 2.0}),
        ("a:1e-3 + b:1e+2 + c:2E3", {"a": 1e-3, "b": 100.0, "c": 2000.0}),
        ("  my cat  :  2  +  b  ", {"my cat": 2.0, "b": 1.0}),
        ('"my cat":0.5 + "-x"', {"my cat": 0.5, "-x": 1.0}),
        ("my-cat_2 + ünï", {"my-cat_2": 1.0, "ünï": 1.0}),
        ("a:0", {"a": 0.0}),
        ("a:0.5\n+ b", {"a": 0.5, "b": 1.0}),
    ],
)
def test_a_blend_reads_as_people_write_it(text: str, expected: dict[str, float]) -> None:
    assert list(Blend.parse(text).weights.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("watercolor:0.8 robot:0.5", 15, "expected '+'"),
        ("a:0.5 b", 6, "expected '+'"),
        ("a +", 3, "expected a concept"),
        ("a + + b", 4, "expected a concept"),
        ("+ a", 0, "expected a concept"),
        (":0.5", 0, "expected a concept"),
        ('a + "b', 4, "expected a concept"),
        ("a + b:x", 6, "weight 'x' of 'b' is not a number"),
        ("a + b:", 6, "weight '' of 'b' is not a number"),
        ("a:nan", 2, "weight 'nan' of 'a' is not finite"),
        ("a: 1e999", 3, "weight '1e999' of 'a' is not finite"),
        ("a:1:2", 3, "expected '+'"),
        ("a + b + a:2", 8, "concept 'a' is named twice; give it one weight"),
    ],
)
def test_an_error_points_at_the_character_where_the_text_goes_wrong(text: str, position: int, words: str) -> None:
    message, shown, mark = refusal(lambda: Blend.parse(text)).split("\n")
    assert words in message
    assert (shown, mark) == (f"  {text}", f"  {' ' * position}^")


fractions = st.floats(0, 1)
spans = st.tuples(fractions, fractions).filter(lambda pair: pair[0] != pair[1]).map(sorted)
groups = st.sampled_from(["all", "text", "down", "mid", "up", "early", "late", "down.1", "text.2", "mid.20"])
blocks = st.dictionaries(groups, st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4)


@st.composite
def schedules(draw: st.DrawFn) -> Steps:
    """Any legal schedule."""
    (start, end), share = draw(spans), draw(fractions)
    ramp = draw(fractions) * (end - start)
    return Steps(start, end, share * ramp, (1 - share) * ramp)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Any legal region."""
    (left, right), (top, bottom), (start, end) = draw(spans), draw(spans), draw(spans)
    place = draw(st.sampled_from(["box", "named", "mask"]))
    box = PLACES[draw(st.sampled_from(list(PLACES)))] if place == "named" else (left, top, right, bottom)
    mask = draw(st.from_regex(r"\A\w[\w-]{0,8}\Z")) if place == "mask" else None
    during = draw(st.booleans())
    return Region(None if mask else box, mask, draw(fractions), start if during else 0.0, end if during else 1.0)


terms = st.builds(
    Term,
    names,
    weights,
    st.none() | blocks.map(lambda factors: tuple(factors.items())),
    st.none() | schedules(),
    st.none() | regions(),
)
methods = (
    st.none() | st.sampled_from(list(METHODS)).map(Method) | st.floats(0.01, 1).map(lambda d: Method("ties", (("density", d),)))
)
blends = st.builds(Blend, st.lists(terms, max_size=4, unique_by=lambda term: (term.name, term.options)), methods)


@settings(deadline=None, max_examples=100)
@given(blends)
def test_every_legal_blend_reads_as_it_is_written(blend: Blend) -> None:
    again = Blend.parse(str(blend))
    assert again == blend
    assert str(again) == str(blend)


@settings(deadline=None, max_examples=60)
@given(blends)
def test_tags_in_a_prompt_are_the_blend(blend: Blend) -> None:
    prompt, found = read_prompt(f"a cat {tags(blend)} on a mat")
    assert found == Blend(blend.terms)
    assert prompt == ("a cat on a mat" if blend.terms else "a cat  on a mat")


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("a:0.6[blocks=down,mid]", Term("a", 0.6, (("down", 1.0), ("mid", 1.0)))),
        ("a[ blocks=all,text:0.5 ]", Term("a", 1.0, (("all", 1.0), ("text", 0.5)))),
        ("a[steps=0.2..1]", Term("a", steps=Steps(0.2, 1.0))),
        ("a:2 [ramp=0.1]", Term("a", 2.0, steps=Steps(0, 1, 0.1, 0.1))),
        ("a[steps=.2..0.8 ramp=0.3,0]", Term("a", steps=Steps(0.2, 0.8, 0.3, 0))),
        ("a[region=left][steps=0..0.5]", Term("a", steps=Steps(0, 0.5), region=Region((0, 0, 0.5, 1)))),
        ("a[region=0,0,.25,1 soft=.1 during=0..0.6]", Term("a", region=Region((0, 0, 0.25, 1), None, 0.1, 0, 0.6))),
        ("a[region=@hat]", Term("a", region=Region(mask="hat"))),
    ],
)
def test_options_read_as_people_write_them(text: str, term: Term) -> None:
    assert Blend.parse(text).terms == (term,)


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("a[", 2, "expected an option and ']'"),
        ("a[]", 2, "expected an option and ']'"),
        ("a[blok=1]", 2, "unknown option 'blok'; there are blocks, steps"),
        ("a[steps=0..1 steps=0..1]", 13, "'steps' is given twice"),
        ("a[blocks=down,foo]", 14, "unknown block group 'foo'"),
        ("a[blocks=down,down]", 14, "'down' is named twice"),
        ("a[blocks=down:x]", 14, "factor 'x' of 'down' is not a number"),
        ("a + b[steps=0.5]", 12, "write a start and an end"),
        ("a[steps=0.5..x]", 13, "'x' is not a number"),
        ("a[steps=0.5..0.2]", 8, "the start before the end"),
        ("a[steps=0..0.5 ramp=0.4]", 8, "fit between start and end"),
        ("a[ramp=1,2,3]", 7, "takes 1 or 2 numbers, not 3"),
        ("a[region=middle]", 9, "unknown region 'middle'; it is one of left, right"),
        ("a[region=0,0,1]", 9, "takes 4 numbers, not 3"),
        ("a[region=0.5,0,0.5,1]", 9, "a box is left,top,right,bottom"),
        ("a[region=@!]", 9, "letters, digits"),
        ("a[soft=0.1]", 7, "'soft' belongs to a region"),
        ("a[region=left soft=7]", 9, "soft is 7"),
        ("a[region=left during=1..0]", 9, "during is 1..0"),
        ("a | foo", 4, "unknown method 'foo'; there are linear, ties"),
        ("a | ties density=7", 4, "density of ties is 7; it is 0.01 to 1"),
        ("a | tsv density=1", 4, "tsv knows no density"),
        ("a | ties density", 9, "expected an option of ties"),
        ("a[region=left] + a[region=left]", 17, "named twice"),
        ("a]", 1, "expected '+'"),
    ],
)
def test_an_error_in_an_option_points_at_it(text: str, position: int, words: str) -> None:
    message, shown, mark = refusal(lambda: Blend.parse(text)).split("\n")
    assert words in message
    assert (shown, mark) == (f"  {text}", f"  {' ' * position}^")


def test_prompts_carry_blends_as_tags() -> None:
    prompt = "a robot <share:watercolor:0.8[steps=0..0.5]>, in <lora:x:0.5:1> a <LORA:my cat> meadow"
    clean, blend = read_prompt(prompt)
    assert clean == "a robot, in a meadow"
    assert str(blend) == "watercolor:0.8[steps=0..0.5] + x:1[blocks=all,text:0.5] + my cat:1"
    assert str(read_prompt("<lora:x:0.8:0.8>")[1]) == "x:0.8"
    assert read_prompt("a  < b > c") == ("a  < b > c", Blend())
    for wrong, position in (("a <share:b", 10), ("a <share:b:x>", 11), ("<share:b><lora:b>", 15), ("<share:>", 7)):
        assert refusal(lambda wrong=wrong: read_prompt(wrong)).split("\n")[2] == f"  {' ' * position}^"


def test_a_blend_changes_one_weight_at_a_time() -> None:
    blend = Blend.parse("a:0.5[region=left] + a:0.2[region=right] + b | ties")
    assert str(blend.with_weight("a", 1)) == "a:1[region=left] + a:1[region=right] + b:1 | ties density=0.5"
    assert str(blend.with_weight("c", -1).without("a")) == "b:1 + c:-1 | ties density=0.5"
    assert str(blend.without("b").without("a")) == ""
    assert blend.weights == {"a": 0.7, "b": 1.0}
    assert (blend.names, blend.plain, Blend.parse("a + b:0").plain) == (["a", "b"], False, True)
    assert str(Blend.parse("a").with_method("dare", drop=0.1)) == "a:1 | dare drop=0.1 seed=0"
    assert Blend.parse("a | linear") == Blend.parse("a")
    assert Blend.parse("a[region=@x] + b[region=@y]").masks == ["x", "y"]


def test_halfway_between_two_blends_is_their_mean() -> None:
    one, other = Blend.parse("a + b:0.5"), Blend.parse("b:1 + c:2[steps=0..0.5]")
    assert str(Blend.between(one, other, 0.5)) == "a:0.5 + b:0.75 + c:1[steps=0..0.5]"
    assert Blend.between(one, other, 0).weights == {"a": 1, "b": 0.5, "c": 0}
    assert Blend.between(one, other, 1).weights == {"a": 0, "b": 1, "c": 2}


@settings(deadline=None, max_examples=60)
@given(schedules())
def test_a_schedules_mean_is_what_its_steps_add_up_to(steps: Steps) -> None:
    count = 2000
    mean = sum(steps.at((step + 0.5) / count) for step in range(count)) / count
    assert abs(mean - steps.mean) < 2e-3
    assert all(0 <= steps.at(step / 10) <= 1 for step in range(11))


def test_a_blend_is_given_in_any_of_its_forms() -> None:
    blend = Blend({"a": 0.5})
    assert Blend.of(blend) is blend
    assert Blend.of("a:0.5") == Blend.of({"a": 0.5}) == blend
    assert Blend.of(None) == Blend.of("") == Blend.of({}) == Blend({})


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_are_finite(weight: float) -> None:
    assert "finite" in refusal(lambda: Blend({"a": 1.0, "b": weight}))


# As drawn: cores


LORAS = {f"c{i}": draw(i, ("unet.a", "unet.b") if i < 3 else ("unet.b",)) for i in range(4)}


@pytest.fixture(scope="module")
def subspace() -> Subspace:
    """Concepts merged in turn, so that earlier ones have fewer rows; the last misses a layer."""
    merged = Subspace()
    for name, lora in LORAS.items():
        merged = merged.merge({name: lora}, capacity=Capacity(retain=None))
    return merged


def dense(subspace: Subspace, cores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The update beta @ C @ alpha.T of every core."""
    return {layer: subspace.layers[layer].beta @ core @ subspace.layers[layer].alpha.T for layer, core in cores.items()}


mixtures = st.dictionaries(st.sampled_from(list(LORAS)), st.floats(-3, 3, width=32), min_size=1)


@settings(deadline=None, max_examples=40)
@given(mixtures)
def test_a_blend_is_the_weighted_sum_of_the_updates(subspace: Subspace, weights: dict[str, float]) -> None:
    """No cross terms, which averaging coefficients side by side would make."""
    blended = dense(subspace, subspace.blend(weights))
    for layer, (out, width) in LAYERS.items():
        updates = [
            weight * LORAS[name].layers[layer].dense() for name, weight in weights.items() if layer in LORAS[name].layers
        ]
        expected = sum(updates, torch.zeros(out, width))
        torch.testing.assert_close(blended.get(layer, torch.zeros(out, width)), expected, atol=1e-4, rtol=0)


def test_the_order_of_a_blend_does_not_matter(subspace: Subspace) -> None:
    weights = {"c0": 0.5, "c1": -1.25, "c2": 2.0}
    first = subspace.blend(weights)
    for order in itertools.permutations(weights):
        cores = subspace.blend({name: weights[name] for name in order})
        assert cores.keys() == first.keys()
        for layer, core in cores.items():
            torch.testing.assert_close(core, first[layer], atol=1e-6, rtol=0)


def test_a_weight_of_zero_is_exactly_absent(subspace: Subspace) -> None:
    with_zero, without = subspace.blend({"c0": 0.7, "c1": 0.0, "c3": -0.0}), subspace.blend({"c0": 0.7})
    assert with_zero.keys() == without.keys()
    assert all(torch.equal(with_zero[layer], core) for layer, core in without.items())
    assert subspace.blend({"c0": 0.0}) == {}
    assert subspace.blend({}) == {}


def test_a_layer_that_no_concept_changes_has_no_core(subspace: Subspace) -> None:
    assert subspace.blend({"c3": 1.0}).keys() == {"unet.b"}


def test_opposite_weights_take_each_other_back(subspace: Subspace) -> None:
    there, back = subspace.blend({"c0": 1.5}), subspace.blend({"c0": -1.5})
    assert all(torch.equal(core, -back[layer]) for layer, core in there.items())


def test_a_blend_has_the_size_of_the_basis_however_many_concepts_it_holds(subspace: Subspace) -> None:
    cores = subspace.blend(dict.fromkeys(subspace.concepts, 0.25))
    assert {layer: tuple(core.shape) for layer, core in cores.items()} == {
        layer: tuple(reversed(basis.rank)) for layer, basis in subspace.layers.items()
    }


def test_an_unknown_concept_is_refused_whatever_its_weight(subspace: Subspace) -> None:
    for weight in (1.0, 0.0):
        message = refusal(lambda weight=weight: subspace.blend({"c0": 1.0, "c9": weight}))
        assert message == "unknown concept 'c9'; the subspace holds: c0, c1, c2, c3"


def test_a_name_typed_with_a_separate_accent_is_found() -> None:
    subspace = Subspace.fit({"caf\u00e9": draw(0)})
    assert subspace.blend(Blend.parse("cafe\u0301:0.5").weights).keys() == LAYERS.keys()
