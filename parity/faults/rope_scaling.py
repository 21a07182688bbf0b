"""RoPE's scaling: numbers of llama3, YaRN and linear scaling that a port takes from elsewhere than config.json."""

from __future__ import annotations

import math
from collections.abc import Callable

from parity.faults.fault import TWO_TOKENS, Change, Fault, Number, Scope, fault
from parity.faults.patches.rope import (
    ROTATED,
    first_dims,
    frequencies,
    has_rope,
    is_plain,
    is_scaled_as,
    parameters_of,
    rotary_fraction,
    tables,
    with_tables,
)

_SLOW = "a prompt of some hundred tokens, for only slow frequencies differ"


def _says(key: str, *kinds: str) -> Callable[[Scope], bool]:
    """Whether the config scales RoPE in one of these ways, and says this parameter."""
    return lambda scope: is_scaled_as(*kinds)(scope) and parameters_of(scope).get(key) is not None


def _own(key: str, default: float = math.nan) -> Callable[[Scope], float]:
    """The config's own number, or what transformers takes where it says none."""
    return lambda scope: float(parameters_of(scope).get(key) or default)


def _with(scope: Scope, key: str, value: float | bool) -> Change:
    """The tables as they are where one parameter of the config has another value."""
    return with_tables(scope, tables(scope, *frequencies(scope, **{key: value})))


@fault(
    id="rope-scaling-factor",
    title="RoPE is scaled by another factor than config.json says",
    sites=ROTATED,
    fix="read `factor` of rope_scaling from config.json; do not keep it as a constant",
    source="TransformerLens#910",
    needs=_SLOW,
    applies=_says("factor", "linear", "llama3", "yarn"),
    number=Number(name="factor", expected=_own("factor"), typical=(8.0, 32.0, 16.0, 4.0, 40.0, 2.0, 1.0)),
)
def rope_scaling_factor(scope: Scope, factor: float) -> Change:
    return _with(scope, "factor", factor)


# The lengths that models were trained at first, and those that they are stretched to.
_LENGTHS = tuple(2.0**n for n in (13, 12, 11, 15, 17, 14, 16, 18, 20, 10, 9, 8, 7, 6, 5))


@fault(
    id="rope-scaling-length",
    title="RoPE's scaling starts from another original length than config.json says",
    sites=ROTATED,
    fix="read original_max_position_embeddings of rope_scaling, not max_position_embeddings",
    needs=_SLOW,
    applies=_says("original_max_position_embeddings", "llama3", "yarn"),
    number=Number(
        name="original_max_position_embeddings", expected=_own("original_max_position_embeddings"), typical=_LENGTHS
    ),
)
def rope_scaling_length(scope: Scope, length: float) -> Change:
    return _with(scope, "original_max_position_embeddings", length)


@fault(
    id="rope-low-freq-factor",
    title="llama3 scaling of RoPE uses another low_freq_factor than config.json says",
    sites=ROTATED,
    fix="read low_freq_factor of rope_scaling from config.json",
    needs=_SLOW,
    applies=_says("low_freq_factor", "llama3"),
    number=Number(name="low_freq_factor", expected=_own("low_freq_factor"), typical=(1.0, 2.0, 0.5)),
)
def rope_low_freq_factor(scope: Scope, factor: float) -> Change:
    return _with(scope, "low_freq_factor", factor)


@fault(
    id="rope-high-freq-factor",
    title="llama3 scaling of RoPE uses another high_freq_factor than config.json says",
    sites=ROTATED,
    fix="read high_freq_factor of rope_scaling from config.json",
    needs=_SLOW,
    applies=_says("high_freq_factor", "llama3"),
    number=Number(name="high_freq_factor", expected=_own("high_freq_factor"), typical=(4.0, 8.0, 2.0)),
)
def rope_high_freq_factor(scope: Scope, factor: float) -> Change:
    return _with(scope, "high_freq_factor", factor)


# What YaRN takes for the two bounds where the config says none.
_FAST, _SLOWEST = 32.0, 1.0


@fault(
    id="rope-beta-fast",
    title="YaRN uses another beta_fast than config.json says",
    sites=ROTATED,
    fix="read beta_fast of rope_scaling from config.json; it is 32 where the config says none",
    needs=_SLOW,
    applies=is_scaled_as("yarn"),
    number=Number(
        name="beta_fast", expected=_own("beta_fast", _FAST), typical=(32.0, 16.0, 64.0, 8.0, 1.0), discrete=True
    ),
)
def rope_beta_fast(scope: Scope, beta: float) -> Change:
    return _with(scope, "beta_fast", beta)


@fault(
    id="rope-beta-slow",
    title="YaRN uses another beta_slow than config.json says",
    sites=ROTATED,
    fix="read beta_slow of rope_scaling from config.json; it is 1 where the config says none",
    needs=_SLOW,
    applies=is_scaled_as("yarn"),
    number=Number(
        name="beta_slow", expected=_own("beta_slow", _SLOWEST), typical=(1.0, 2.0, 0.5, 3.0, 4.0, 32.0), discrete=True
    ),
)
def rope_beta_slow(scope: Scope, beta: float) -> Change:
    return _with(scope, "beta_slow", beta)


def _rounds(scope: Scope) -> bool:
    """Whether YaRN's bounds are whole pairs."""
    return bool(parameters_of(scope).get("truncate", True))


@fault(
    id="rope-yarn-not-truncated",
    title="YaRN's ramp begins and ends between two pairs; the reference rounds both bounds to whole pairs",
    sites=ROTATED,
    fix="round the lower bound down and the upper one up, unless rope_scaling says `truncate: false`",
    needs=_SLOW,
    applies=lambda s: is_scaled_as("yarn")(s) and _rounds(s),
)
def rope_yarn_not_truncated(scope: Scope) -> Change:
    return _with(scope, "truncate", False)


@fault(
    id="rope-yarn-truncated",
    title="YaRN's ramp begins and ends at whole pairs; the reference rounds neither bound",
    sites=ROTATED,
    fix="keep the fractions of both bounds where rope_scaling says `truncate: false`",
    needs=_SLOW,
    applies=lambda s: is_scaled_as("yarn")(s) and not _rounds(s),
)
def rope_yarn_truncated(scope: Scope) -> Change:
    return _with(scope, "truncate", True)


@fault(
    id="rope-scaled-linearly",
    title="RoPE divides all frequencies by the factor, as linear scaling does; the config asks for llama3 or YaRN",
    sites=ROTATED,
    fix="follow rope_type of rope_scaling: llama3 and YaRN leave fast pairs as they are",
    needs=_SLOW,
    applies=_says("factor", "llama3", "yarn"),
)
def rope_scaled_linearly(scope: Scope) -> Change:
    return with_tables(scope, tables(scope, frequencies(scope, rope_type="linear")[0], 1.0))


@fault(
    id="rope-frequencies-unscaled",
    title="RoPE carries the attention factor of its scaling, and turns by unscaled frequencies",
    sites=ROTATED,
    fix="scale the frequencies as well as the tables",
    needs=_SLOW,
    # Without a factor it is scaling that is ignored.
    applies=lambda s: is_scaled_as("yarn", "longrope")(s) and frequencies(s)[1] != 1.0,
)
def rope_frequencies_unscaled(scope: Scope) -> Change:
    plain, _ = frequencies(scope, rope_type="default")
    return with_tables(scope, tables(scope, plain, frequencies(scope)[1]))


@fault(
    id="rope-fraction",
    title="RoPE rotates another part of each head than config.json says",
    sites=ROTATED,
    fix="rotate partial_rotary_factor * head_dim numbers of each head, by the angles of a head of that size",
    source="MaxText 942563445",
    needs=TWO_TOKENS,
    applies=lambda s: has_rope(s) and is_plain(s) and rotary_fraction(s) < 1.0,
    number=Number(name="fraction", expected=rotary_fraction, typical=(0.25, 0.5, 0.75, 0.4), discrete=True),
)
def rope_fraction(scope: Scope, fraction: float) -> Change:
    return first_dims(scope, fraction)


FAULTS: tuple[Fault, ...] = (
    rope_scaling_factor,
    rope_scaling_length,
    rope_low_freq_factor,
    rope_high_freq_factor,
    rope_beta_fast,
    rope_beta_slow,
    rope_yarn_not_truncated,
    rope_yarn_truncated,
    rope_scaled_linearly,
    rope_frequencies_unscaled,
    rope_fraction,
)
