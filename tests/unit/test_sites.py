"""Names: what a bug in all layers has in common, and what tells layers apart."""

import pytest

from parity.sites import ends_of, family, group_label, layer_of, short

NAMES = [
    # name, family, layer, short, group label
    (
        "model.layers.3.self_attn.q_rope",
        "model.layers.*.self_attn.q_rope",
        3,
        "self_attn.q_rope",
        "layers.3",
    ),
    ("model.layers.3", "model.layers.*", 3, "output", "layers.3"),
    ("model.layers.10.mlp", "model.layers.*.mlp", 10, "mlp", "layers.10"),
    ("model.layers.0.resid_mid", "model.layers.*.resid_mid", 0, "resid_mid", "layers.0"),
    ("transformer.h.1.attn", "transformer.h.*.attn", 1, "attn", "h.1"),
    ("gpt_neox.layers.2.attention.dense", "gpt_neox.layers.*.attention.dense", 2, "attention.dense", "layers.2"),
    (
        "model.layers.3.mlp.experts.7.up_proj",
        "model.layers.*.mlp.experts.7.up_proj",
        3,
        "mlp.experts.7.up_proj",
        "layers.3",
    ),
    ("h.12", "h.*", 12, "output", "h.12"),
    ("5.mlp", "*.mlp", 5, "mlp", "5"),
    ("model.embed_tokens", "model.embed_tokens", None, "model.embed_tokens", "embed_tokens"),
    ("lm_head", "lm_head", None, "lm_head", "lm_head"),
    ("model.norm2.fc1", "model.norm2.fc1", None, "model.norm2.fc1", "fc1"),
    ("model.layer1.fc_2x.x3", "model.layer1.fc_2x.x3", None, "model.layer1.fc_2x.x3", "x3"),
]


@pytest.mark.parametrize(("name", "kin", "layer", "brief", "label"), NAMES, ids=[n[0] for n in NAMES])
def test_a_name_says_its_family_layer_and_row(name: str, kin: str, layer: int | None, brief: str, label: str) -> None:
    assert family(name) == kin
    assert layer_of(name) == layer
    assert short(name) == brief
    assert group_label(name) == label


def test_families_gather_layers_and_keep_experts_apart() -> None:
    assert family("model.layers.1.mlp.experts.3") == family("model.layers.27.mlp.experts.3")
    assert family("model.layers.1.mlp.experts.3") != family("model.layers.1.mlp.experts.4")
    assert family(family("model.layers.1.mlp")) == "model.layers.*.mlp"


def test_a_name_ends_at_its_dots_and_a_layer_in_nothing_too() -> None:
    assert ends_of("model.layers.3.mlp#1") == {"mlp", "3.mlp", "layers.3.mlp", "model.layers.3.mlp"}
    assert ends_of("layers.3") == {"", "3", "layers.3"}
    assert "" not in ends_of("model.layer3") | ends_of("3")
