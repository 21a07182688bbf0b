"""What a new user and a script do first: from a port of other names to a named cause, and a loop until it matches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parity.sites import family
from tests.conftest import ROOT, Ran

Cli = Callable[..., Ran]
PAGE = ROOT / "reports" / "AGENTS.md"
TOKENS = "5 17 3 120 44 9 61 2 33"

# A port of two layers in plain PyTorch, with names of its own.
PORT = """
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


class Scale(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.gain * y.to(x.dtype)


class Attend(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.groups, self.size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
        width = c["hidden_size"]
        self.wq = nn.Linear(width, self.heads * self.size, bias=False)
        self.wk = nn.Linear(width, self.groups * self.size, bias=False)
        self.wv = nn.Linear(width, self.groups * self.size, bias=False)
        self.wo = nn.Linear(self.heads * self.size, width, bias=False)
        self.qn, self.kn = Scale(self.size, c["rms_norm_eps"]), Scale(self.size, c["rms_norm_eps"])

    def turn(self, x):
        t, d = x.shape[-2:]
        rate = self.theta ** -(torch.arange(0, d, 2).float() / d)
        angle = torch.outer(torch.arange(t).float(), rate)
        cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angle.cos(), angle.sin()))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x):
        b, t, _ = x.shape
        q = self.turn(self.qn(self.wq(x).view(b, t, self.heads, self.size)).transpose(1, 2))
        k = self.turn(self.kn(self.wk(x).view(b, t, self.groups, self.size)).transpose(1, 2))
        v = self.wv(x).view(b, t, self.groups, self.size).transpose(1, 2)
        k, v = (y.repeat_interleave(self.heads // self.groups, 1) for y in (k, v))
        scores = q @ k.transpose(2, 3) * self.size**-0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
        y = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return self.wo(y.transpose(1, 2).reshape(b, t, -1))


class Feed(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, inner = c["hidden_size"], c["intermediate_size"]
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        eps = c["rms_norm_eps"]
        self.n1, self.mix = Scale(c["hidden_size"], eps), Attend(c)
        self.n2, self.feed = Scale(c["hidden_size"], eps), Feed(c)

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.feed(self.n2(x))


class Net(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.last, self.out = Scale(c["hidden_size"], c["rms_norm_eps"]), None
        self.out = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.out(self.last(x))


NAMES = [
    ("model.embed_tokens", "embed"), ("model.norm", "last"), ("lm_head", "out"), ("model.layers", "blocks"),
    ("input_layernorm", "n1"), ("post_attention_layernorm", "n2"), ("self_attn.q_norm", "mix.qn"),
    ("self_attn.k_norm", "mix.kn"), ("self_attn.q_proj", "mix.wq"), ("self_attn.k_proj", "mix.wk"),
    ("self_attn.v_proj", "mix.wv"), ("self_attn.o_proj", "mix.wo"), ("mlp.gate_proj", "feed.w1"),
    ("mlp.up_proj", "feed.w3"), ("mlp.down_proj", "feed.w2"),
]


def load(model_dir, dtype, device):
    net = Net(json.loads((Path(model_dir) / "config.json").read_text()))
    weights = {}
    for key, value in load_file(Path(model_dir) / "model.safetensors").items():
        for theirs, ours in NAMES:
            key = key.replace(theirs, ours)
        is_scale = any(part in key for part in ("n1", "n2", "qn", "kn", "last"))
        weights[key.replace("weight", "gain") if is_scale else key] = value
    weights.setdefault("out.weight", weights["embed.weight"])
    net.load_state_dict(weights)
    return net.to(getattr(torch, dtype))
"""


# What the user writes down from two lists: the port's own modules, and what `parity sites` prints.
MAP = {
    "embed": "model.embed_tokens",
    "last": "model.norm",
    "out": "lm_head",
    "blocks.*": "model.layers.*",
    "blocks.*.n1": "model.layers.*.input_layernorm",
    "blocks.*.n2": "model.layers.*.post_attention_layernorm",
    "blocks.*.mix.qn": "model.layers.*.self_attn.q_norm",
    "blocks.*.mix.kn": "model.layers.*.self_attn.k_norm",
    "blocks.*.mix.wq": "model.layers.*.self_attn.q_proj",
    "blocks.*.mix.wk": "model.layers.*.self_attn.k_proj",
    "blocks.*.mix.wv": "model.layers.*.self_attn.v_proj",
    "blocks.*.mix.wo": "model.layers.*.self_attn.o_proj",
    "blocks.*.feed.w1": "model.layers.*.mlp.gate_proj",
    "blocks.*.feed.w3": "model.layers.*.mlp.up_proj",
    "blocks.*.feed.w2": "model.layers.*.mlp.down_proj",
}


@pytest.fixture
def port(tmp_path: Path) -> Path:
    """A port with GELU in place of SiLU, and its name map beside it."""
    path = tmp_path / "my_port.py"
    path.write_text(PORT.replace("F.silu(", "F.gelu("))
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    return path


@pytest.mark.slow
def test_three_commands_lead_to_a_named_cause(cli: Cli, small: Path, port: Path, tmp_path: Path) -> None:
    asked = ("--model", small, "--tokens", TOKENS)
    listed = {line.split()[0] for line in cli("sites", "--model", small).out.splitlines()}
    assert set(MAP.values()) <= listed
    proposed = cli("names", "my_port.py:load", *asked, "-o", "proposed.json")
    assert proposed.code == 0, proposed.err
    for name, site in json.loads((tmp_path / "proposed.json").read_text()).items():
        assert MAP[family(name)] == family(site), "what values tell is what the user would write"
    ran = cli("diff", "-c", "my_port.py:load", "--names", "map.json", *asked)
    assert ran.code == 1, ran.err + ran.out
    assert "the activation is GELU" in ran.out
    assert "fix: use hidden_act of config.json" in ran.out


def page_code() -> dict[str, Any]:
    """What the page for agents defines."""
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "reports" / "AGENTS.md").read_text(encoding="utf-8"), re.DOTALL
    )
    defined: dict[str, Any] = {}
    exec(compile(code, "AGENTS.md", "exec"), defined)
    return defined


@pytest.mark.slow
def test_a_script_mends_a_port_until_it_matches(cli: Cli, small: Path, port: Path) -> None:
    asked = ("--model", small, "--tokens", TOKENS, "--names", "map.json")

    def compare() -> tuple[int, dict[str, Any]]:
        ran = cli("diff", "-c", "my_port.py:load", *asked, "--json")
        return ran.code, json.loads(ran.out)

    def mend(finding: dict[str, Any]) -> None:
        assert finding["fault"]["id"] == "act-gelu"
        assert "hidden_act" in finding["fault"]["fix"]
        port.write_text(port.read_text().replace("F.gelu(", "F.silu("))

    assert page_code()["mend_until_match"](compare, mend) == ["act-gelu"]


def test_a_run_without_findings_ends_the_loop() -> None:
    loop = page_code()["mend_until_match"]
    with pytest.raises(RuntimeError, match="too little"):
        loop(lambda: (2, {"findings": [], "headline": "too little was measured"}), print)
    with pytest.raises(RuntimeError, match="still diverged"):
        loop(lambda: (1, {"findings": [{"fault": None}], "headline": ""}), lambda finding: None, most=2)


def test_the_page_names_the_keys_of_a_report() -> None:
    text = PAGE.read_text(encoding="utf-8")
    report = json.loads((ROOT / "reports" / "example" / "report.json").read_text(encoding="utf-8"))
    finding = report["findings"][0]
    tables = (report, finding, finding["fault"], report["sites"][0], report["coverage"], report["power"])
    known = {key for table in tables for key in table}
    table = text.partition("| key |")[2].partition("\n## ")[0]
    named: set[str] = set()
    for row in table.splitlines():
        named.update(re.findall(r"`(?:findings\[\]\.)?([a-z_]+)(?:\[\])?`", row.split("|")[1] if "|" in row else ""))
    assert {"verdict", "findings", "fault", "span", "coverage", "power"} <= named
    assert named <= known, "a key that a report does not have"
