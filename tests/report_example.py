"""Hand-made Comparisons for the tests of the reports: one with everything in it, one hostile, one large."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from parity import words
from parity.predictions import LogitSample, NextToken, Token
from parity.quantization import WeightError
from parity.reasons import Gap, Invisible, NotTried, Trouble
from parity.results import (
    Check,
    Comparison,
    Coverage,
    Environment,
    FaultMatch,
    Finding,
    Measurement,
    Power,
    Reading,
    Residual,
    SiteVerdict,
    Structure,
)

ROPE = FaultMatch(
    id="rope-theta",
    title="RoPE uses another theta",
    fix="read rope_theta from config.json",
    explained=0.999998,
    remainder_ratio=1.004,
    rivals=("rope-stretched",),
    reads={"rope_theta": Reading(10000.4, 3.1, 1e6)},
)


def structure(ratio: float, tokens: int = 8, heads: int = 0, first: int | None = None) -> Structure:
    """A profile that grows from half the ratio to the ratio."""
    profile = tuple(ratio * (0.5 + 0.5 * i / max(tokens - 1, 1)) for i in range(tokens))
    return Structure(0.125, 0.25, profile, tuple(ratio for _ in range(heads)), 3, 0.4, first, 640)


def residual(site: str) -> Residual:
    """Four heads at eight tokens: from token 3 on, the second head is wrong."""
    return Residual(site, "head", 4, tuple((1.0, 500.0 if token > 2 else 0.5, 0.9, 1.1) for token in range(8)))


def measurement(site: str, verdict: SiteVerdict, ratio: float | None, **changes: Any) -> Measurement:
    """A site with plausible numbers; an unmeasured one has none."""
    if verdict == "unmeasured":
        return Measurement(site, verdict, "", **({"gap": Gap("not recorded")} | changes))
    r = 1.0 if ratio is None else ratio
    values: dict[str, Any] = {
        "reason": {"exact": "bit-equal to the reference on the same inputs"}.get(verdict, "because"),
        "ratio": ratio,
        "row_max": 2 * r,
        "local_rel": 0.002 * r,
        "inherited_rel": 0.001,
        "floor_rel": 0.002,
        "total_ratio": 1.5 * r,
        "bit_equal": verdict == "exact",
        "mse": 1e-6 * r * r,
        "cosine": max(0.0, 1 - 1e-6 * r * r) if math.isfinite(r) else math.nan,
        "max_abs": 0.01 * r,
        "rel_l2": 0.003 * r,
        "ulp_max": 2.0,
        "ulps": None if verdict == "exact" else (600, 30, 9, 1),
        "structure": structure(r, heads=4 if "rope" in site else 0),
        "dtype": "bfloat16",
        "shape": (1, 8, 12),
    }
    return Measurement(site, verdict, **(values | changes))


def environment(**changes: Any) -> Environment:
    """What was run."""
    values: dict[str, Any] = {
        "model": "tiny-qwen3",
        "fingerprint": "0123456789abcdef",
        "candidate": "port.py:load",
        "prompt": "Once upon a time\nthere was a painter.",
        "tokens": 8,
        "batch": 1,
        "working_dtype": "bfloat16",
        "candidate_dtype": "bfloat16",
        "truth_dtype": "float32",
        "device": "cpu",
        "attention": "eager",
        "versions": {"parity": "0.1.0", "torch": "2.13.0"},
        "command": "parity diff --prompt-file prompt.txt --candidate port.py:load",
        "created": "2026-01-02T03:04:05+00:00",
        "seconds": {"record candidate": 1.25, "replay": 2.5},
    }
    return Environment(**(values | changes))


MISSHAPEN = Gap("misshapen", (8, 3), axes=("token", "feature"), sizes=(8, 4))


def _sites() -> tuple[Measurement, ...]:
    layer, step = "model.layers.{}.{}", "transposed (token, head, head_dim) to (head, token, head_dim)"
    return (
        measurement("model.embed_tokens", "exact", 0.0),
        measurement(layer.format(0, "input_layernorm"), "rounding", 1.1),
        measurement(layer.format(0, "self_attn.q_rope"), "wrong", 541.0, steps=(step,)),
        measurement(layer.format(0, "mlp.act_fn"), "imprecise", 3.25),
        measurement("model.layers.0", "exact", 1.0),
        measurement(layer.format(1, "input_layernorm"), "unmeasured", None),
        measurement(layer.format(1, "self_attn.q_rope"), "wrong", 12345.0, steps=(step,)),
        measurement(layer.format(1, "mlp.act_fn"), "unmeasured", None, gap=MISSHAPEN),
        measurement("model.layers.1", "nonfinite", math.inf, reason="3 values are NaN or infinite, on finite inputs"),
        measurement("model.norm", "rounding", 1.3),
        measurement("lm_head", "rounding", 0.9, mse=5.4, cosine=0.906166, total_ratio=78.0),
    )


def everything() -> Comparison:
    """A diverged run with every verdict, a fault that reads a constant, a span, a failed check and power."""
    sites = _sites()
    rope = tuple(m.site for m in sites if m.site.endswith("q_rope"))
    run = Comparison(
        verdict="diverged",
        headline="",
        answer="",
        findings=(
            Finding(
                ("model.layers.*.self_attn.q_rope",),
                rope,
                (0, 1),
                "wrong",
                12345.0,
                1,
                ("the error grows with position", "40% of the error in channel 3"),
                fault=ROPE,
                residual=residual(rope[1]),
            ),
            Finding(("model.layers.*.mlp.act_fn",), ("model.layers.0.mlp.act_fn",), (0,), "imprecise", 3.25, None, ()),
            Finding(
                ("model.layers.*",),
                ("model.layers.1",),
                (1,),
                "nonfinite",
                math.inf,
                0,
                ("3 values are NaN or infinite, on finite inputs",),
                span=("model.layers.1.mlp.act_fn",),
            ),
        ),
        sites=sites,
        next_token=NextToken(
            reference=(Token(5, " Emma", 13.875), Token(6, " Grace", 7.875), Token(7, "\n", 6.5)),
            candidate=(Token(8, " Felix", 9.3125), Token(6, " Grace", 8.75)),
            flips=3,
            unexplained_flips=2,
            positions=8,
            max_kl=16.1,
            margin_sigma=0.03,
            sample=LogitSample((13.875, 7.875, 6.5, -3.25, -8.0), (2.5, 8.75, 6.0, 9.3125, -7.5), 1000),
        ),
        coverage=Coverage(9, 11),
        checks=(Check("reference TF32", True, "off"), Check("candidate weights", False, "lm_head.weight differs")),
        troubles=(Trouble("error map", "ValueError: no room", "model.layers.0.mlp.up_proj"),),
        environment=environment(),
        power=Power(
            ("rope-interleaved", "act-gelu"),
            (
                Invisible("norm-eps", "drowns", 0.2),
                Invisible("softmax-low", "drowns", 1.0),
                Invisible("window-applied", "no effect", needs="a prompt longer than the window"),
            ),
            (NotTried("head-transposed", "large"), NotTried("softcap-missing", "no place")),
            "bfloat16",
        ),
    )
    return words.spoken(run)


def matching() -> Comparison:
    """A run in which nothing is wrong."""
    run = everything()
    token = run.next_token
    assert token is not None
    run = dataclasses.replace(
        run,
        verdict="match",
        findings=(),
        sites=tuple(measurement(m.site, "rounding", 1.0) for m in run.sites),
        next_token=dataclasses.replace(token, candidate=token.reference, flips=0, unexplained_flips=0),
        coverage=Coverage(11, 11),
        checks=(Check("reference TF32", True, "off"),),
        troubles=(),
        power=None,
    )
    return words.spoken(run)


def in_regime() -> Comparison:
    """A match in which one operation computes in an accepted regime."""
    site = "model.layers.0.self_attn.q_rope"
    fault = dataclasses.replace(ROPE, id="kv-cache-fp16", remainder_ratio=0.41)
    found = Finding(("model.layers.*.self_attn.q_rope",), (site,), (0,), "wrong", 4147.0, 0, (), fault=fault)
    run = matching()
    sites = tuple(dataclasses.replace(m, regime="kv-cache-fp16") if m.site == site else m for m in run.sites)
    return words.spoken(dataclasses.replace(run, sites=sites, accepted=(found,)))


def on_own_weights() -> Comparison:
    """A match of a quantized port."""
    errors = (
        WeightError("lm_head.weight", "Q4_K", 0.0625, 0.4, cost=0.125),
        WeightError("model.norm.weight", "F32", 0.0, 0.0),
    )
    return words.spoken(dataclasses.replace(matching(), weights=errors))


EVIL = (
    "<script>alert(1)</script></script><!-- ]]> & \"'` | **b** [x](http://evil.example) @all #1 {{ 7*7 }} "
    "\x1b[31m\u202e\u2028\n# h"
)


def hostile() -> Comparison:
    """Every string that comes from a model, a prompt or a dump tries to be something else."""
    run = everything()
    fault = dataclasses.replace(
        ROPE, id=EVIL, title=EVIL, fix=EVIL, rivals=(EVIL,), reads={EVIL: Reading(1.0, 0.1, 2.0)}
    )
    names = {m.site: f"{m.site}.{EVIL}" for m in run.sites if "norm" in m.site or "act_fn" in m.site}
    token, evil = Token(1, EVIL, 1.0), Gap("unknown", detail=EVIL)
    assert run.next_token is not None
    env = {f.name: EVIL for f in dataclasses.fields(Environment) if f.type in ("str", "str | None")}
    return dataclasses.replace(
        run,
        headline=EVIL,
        answer=EVIL,
        sites=tuple(
            dataclasses.replace(
                m,
                site=names.get(m.site, m.site),
                reason=EVIL,
                dtype=EVIL,
                steps=(EVIL,),
                gap=m.gap and evil,
                regime=EVIL,
            )
            for m in run.sites
        ),
        findings=tuple(
            dataclasses.replace(
                f, families=(EVIL, EVIL), sites=(f.sites[0],), evidence=(EVIL,), span=(EVIL,), fault=fault
            )
            for f in run.findings
        ),
        next_token=dataclasses.replace(run.next_token, reference=(token, token), candidate=(token, token)),
        accepted=(dataclasses.replace(run.findings[0], families=(EVIL,), fault=fault),),
        weights=(WeightError(EVIL, EVIL, 1.0, 2.0, EVIL),),
        checks=(Check(EVIL, False, EVIL), Check(EVIL, True, EVIL)),
        troubles=(Trouble("causes", EVIL, EVIL),),
        environment=dataclasses.replace(run.environment, **env, versions={EVIL: EVIL}, seconds={EVIL: 1.0}),
        power=Power((EVIL,), (Invisible(EVIL, "no effect", needs=EVIL), Invisible(EVIL, "drowns")), (), EVIL),
    )


def large(layers: int, families: int = 20, tokens: int = 4096) -> Comparison:
    """As many sites as a big model has, each with a full profile of numbers that do not compress to one digit."""
    wide = tuple(1.0 + math.sin(i) / 3 for i in range(256))
    shape = Structure(0.1, 0.2, wide, wide[:64], 7, 0.1, None, 10**6, math.ceil(tokens / len(wide)))
    ulps = tuple(10**7 + 7 * place for place in range(13))
    sites = tuple(
        measurement(
            f"model.layers.{i}.self_attn.family_{j}", "rounding", 1 + (i * j % 97) / 100, structure=shape, ulps=ulps
        )
        for i in range(layers)
        for j in range(families)
    )
    return dataclasses.replace(
        matching(), sites=sites, coverage=Coverage(len(sites), len(sites)), environment=environment(tokens=tokens)
    )
