"""The method on models that draw nothing: the same attach, learn and merge on a ViT and on a text encoder."""

import sys
from pathlib import Path
from statistics import mean

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from stream.elsewhere import captions, digits, go_through


@pytest.mark.slow
@pytest.mark.parametrize("make", [digits, captions])
def test_share_keeps_a_stream_of_tasks_that_a_sequential_lora_forgets(make):
    found = go_through(make())
    own, single = mean(found["own_lora"].values()), mean(found["sequential_lora"]["at_the_end"].values())
    assert own >= 0.9
    assert found["base_untouched"]
    for share in found["share"].values():
        assert mean(share["at_the_end"].values()) >= max(own - 0.15, single + 0.3)
        assert share["at_the_end"] == share["when_learned"]  # not one answer changes while later tasks are learned
        assert share["retention"] >= 0.999 - 1e-6
        assert share["numbers"] < found["loras_numbers"]
        assert share["concept_numbers"] <= found["loras_numbers"] / len(found["base"]) / 2
