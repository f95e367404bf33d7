"""What `--freeze` leaves out of a scheme."""

import pytest
from tiny import causal_model

from zotune.errors import InputError
from zotune.models.schemes import prepare


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_patterns_leave_matching_parameters_out_and_nothing_else():
    whole = trained(prepare(causal_model(), "full"))
    left = trained(prepare(causal_model(), "full", ["*embed_tokens*", "*norm*"]))
    assert left == {name for name in whole if "embed_tokens" not in name and "norm" not in name} != whole


@pytest.mark.parametrize(("pattern", "said"), [("*nothing_like_it*", "matches no trainable"), ("*", "nothing is left")])
def test_a_pattern_without_effect_or_without_rest_is_refused(pattern, said):
    with pytest.raises(InputError, match=said):
        prepare(causal_model(), "full", [pattern])
