"""The options of torch.compile are split and checked; every mistake is named."""

from __future__ import annotations

import pytest

from hisa_compile.config import KEYS, parse_options
from hisa_compile.passes import PassSettings


def test_no_options_mean_the_defaults():
    """Nothing given: budgets are derived, all indexers are rewritten, Inductor generates the code."""
    for empty in (None, {}):
        options = parse_options(empty)
        assert options.settings == PassSettings(block_size=None, block_topk=None, scope="all", coarse=None)
        assert options.base == "inductor"
        assert options.inductor == {}


def test_our_keys_are_taken_out_and_the_rest_is_inductors():
    """Keys that start with anything but "hisa." reach Inductor unchanged."""
    given = {"hisa.block_size": 32, "max_autotune": True, "hisa.block_topk": 8, "hisa.scope": "marked", "hisabella": 1}
    given["hisa.coarse"] = "probe"
    options = parse_options(given)
    assert options.settings == PassSettings(32, 8, "marked", "probe")
    assert options.inductor == {"max_autotune": True, "hisabella": 1}
    assert given["hisa.block_size"] == 32


def test_an_unknown_key_is_refused_with_the_valid_ones():
    """A misspelt setting must not be dropped in silence."""
    with pytest.raises(ValueError, match=r"hisa\.blocksize.*did you mean 'hisa\.block_size'") as error:
        parse_options({"hisa.blocksize": 32})
    assert all(key in str(error.value) for key in KEYS)
    with pytest.raises(ValueError, match=r"hisa\.zzz"):
        parse_options({"hisa.zzz": 1})


@pytest.mark.parametrize("key", ["hisa.block_size", "hisa.block_topk"])
@pytest.mark.parametrize("value", ["64", 64.0, True, [64]])
def test_a_budget_that_is_no_integer_is_a_type_error(key, value):
    """The message names the key and what it got."""
    with pytest.raises(TypeError, match=rf"{key}: got .*{type(value).__name__}.*expected"):
        parse_options({key: value})


@pytest.mark.parametrize(("key", "value"), [("hisa.block_size", 0), ("hisa.block_topk", -3), ("hisa.block_topk", 1)])
def test_a_budget_out_of_range_is_a_value_error(key, value):
    """The first and the last block are always kept, so fewer than two blocks are no budget."""
    with pytest.raises(ValueError, match=rf"{key}: got {value}, expected"):
        parse_options({key: value})


def test_a_coarse_stage_is_one_of_four_or_left_open():
    """The message names the key, what it got and what there is."""
    for stage in ("paper", "spread", "probe", "two-level", None):
        assert parse_options({"hisa.coarse": stage}).settings == PassSettings(coarse=stage)
    expected = r"expected None or one of 'paper', 'spread', 'probe', 'two-level'$"
    with pytest.raises(ValueError, match=rf"^hisa\.coarse: got 'mean', {expected}"):
        parse_options({"hisa.coarse": "mean"})
    with pytest.raises(TypeError, match=rf"^hisa\.coarse: got True \(bool\), {expected}"):
        parse_options({"hisa.coarse": True})
    with pytest.raises(ValueError, match=r"did you mean 'hisa\.coarse'"):
        parse_options({"hisa.course": "paper"})


@pytest.mark.parametrize("key", ["hisa.scope", "hisa.base"])
def test_a_choice_is_checked(key):
    """The message lists what may be chosen."""
    with pytest.raises(ValueError, match=rf"{key}: got 'none', expected one of \("):
        parse_options({key: "none"})
    with pytest.raises(TypeError, match=rf"{key}: got None"):
        parse_options({key: None})


@pytest.mark.parametrize("base", ["aot_eager", "eager"])
def test_inductor_options_without_inductor_are_refused(base):
    """An option that has no effect is a mistake."""
    with pytest.raises(ValueError, match=r"'max_autotune'.*no effect"):
        parse_options({"hisa.base": base, "max_autotune": True})
    assert parse_options({"hisa.base": base}).base == base
