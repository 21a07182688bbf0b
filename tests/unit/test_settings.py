"""[tool.parity]: what is read, which glob wins, and what an error says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from parity import settings
from parity.errors import UsageError

SITES = ["model.embed_tokens", "model.layers.0.mlp.act_fn", "model.layers.0", "model.norm", "lm_head"]


def read(folder: Path, text: str) -> settings.Settings:
    (folder / "pyproject.toml").write_text(text)
    return settings.load(folder)


def test_without_a_file_or_table_the_verdicts_decide(tmp_path: Path) -> None:
    assert settings.load(tmp_path) == settings.Settings()
    assert read(tmp_path, "[tool.ruff]\nline-length = 120") == settings.Settings()


def test_the_last_glob_that_matches_decides_alone(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        '[tool.parity.thresholds]\n"*" = { ratio = 3 }\n"*.mlp.*" = { mse = 1e-3, cosine = 0.99 }\nlm_head = {}',
    )
    assert found.limits("model.norm") == (("ratio", 3.0),)
    assert found.limits("model.layers.0.mlp.act_fn") == (("mse", 1e-3), ("cosine", 0.99))
    assert found.limits("lm_head") == ()


def test_a_call_is_looked_at_after_the_file(tmp_path: Path) -> None:
    file = read(
        tmp_path,
        '[tool.parity]\nallow_unmeasured = ["model.norm"]\n[tool.parity.thresholds]\nlm_head = { ratio = 3 }',
    )
    both = file.and_then(settings.parse({"lm*": {"ratio": 9}}, ["*.mlp.*"], "cases()"))
    assert both.limits("lm_head") == (("ratio", 9.0),)
    assert [both.may_be_unmeasured(site) for site in SITES] == [False, True, False, True, False]


def test_accepted_regimes_of_file_and_call_add_up(tmp_path: Path) -> None:
    file = read(tmp_path, '[tool.parity]\naccept = ["kv-cache-fp16"]')
    assert file.accept == ("kv-cache-fp16",)
    assert file.and_then(settings.Settings(accept=("products-tf32",))).accept == ("kv-cache-fp16", "products-tf32")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[tool.parity]\naccept = "kv-cache-fp16"',
            "pyproject.toml [tool.parity]: accept is 'kv-cache-fp16'. Give a list of regimes, such as"
            " ['kv-cache-fp16'].",
        ),
        (
            "[tool.parity]\nthreshold = {}",
            "pyproject.toml [tool.parity]: unknown key 'threshold'. Did you mean 'thresholds'?"
            " Known keys: accept, allow_unmeasured, thresholds.",
        ),
        (
            "[tool.parity.thresholds]\nlm_head = { rato = 3 }",
            "pyproject.toml [tool.parity] threshold 'lm_head': unknown key 'rato'. Did you mean 'ratio'?"
            " Known keys: ratio, mse, cosine, max_abs.",
        ),
        (
            "[tool.parity.thresholds]\nnext_token = { mse = 3 }",
            "pyproject.toml [tool.parity] threshold 'next_token': unknown key 'mse'. Known keys: kl.",
        ),
        (
            "[tool.parity.thresholds]\nlm_head = { kl = 3 }",
            "pyproject.toml [tool.parity] threshold 'lm_head': 'kl' is known of next_token alone."
            " Write it under next_token.",
        ),
        (
            "[tool.parity.thresholds]\nmodel.norm = { ratio = 3 }",
            "pyproject.toml [tool.parity] threshold 'model': holds another table, 'norm'."
            " Put a site's name in quotes: otherwise TOML reads its dots as tables.",
        ),
        (
            "[tool.parity.thresholds]\nlm_head = 3",
            "pyproject.toml [tool.parity] threshold 'lm_head': is 3. Give a table such as { ratio = 1 }.",
        ),
        (
            "[tool.parity.thresholds]\nlm_head = { ratio = -3 }",
            "pyproject.toml [tool.parity] threshold 'lm_head': ratio is -3. Give a number, not negative.",
        ),
        (
            '[tool.parity]\nallow_unmeasured = "*"',
            "pyproject.toml [tool.parity]: allow_unmeasured is '*'. Give a list of globs.",
        ),
        (
            "[tool.parity]\nthresholds = 3",
            "pyproject.toml [tool.parity]: thresholds is 3. Give a table such as {'*.mlp.*': {'ratio': 4}}.",
        ),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    assert str(error.value) == said


def test_a_broken_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not readable as TOML"):
        read(tmp_path, "[tool")


@pytest.mark.parametrize("value", [True, "3", float("nan"), None])
def test_a_limit_is_a_number(value: Any) -> None:
    with pytest.raises(UsageError, match="ratio is "):
        settings.parse({"lm_head": {"ratio": value}}, (), "cases()")


def test_a_glob_that_matches_nothing_is_named_with_its_neighbour() -> None:
    families = ["model.embed_tokens", "model.layers.*.mlp.act_fn", "model.norm", "lm_head"]
    settings.parse({"*.mlp.*": {}, "next_token": {}}, ["lm_head"], "").check_globs(SITES, families)
    with pytest.raises(UsageError) as error:
        settings.parse({"lm_haed": {}}, (), "").check_globs(SITES, families)
    assert str(error.value) == "'lm_haed': matches none of the 5 sites. Did you mean 'lm_head'?"
    with pytest.raises(UsageError, match=r"Did you mean 'model\.layers\.\*\.mlp\.act_fn'"):
        settings.parse({}, ["*.mpl.act_fn"], "").check_globs(SITES, families)
    with pytest.raises(UsageError, match="Did you mean 'next_token'"):
        settings.parse({"nxt_token": {}}, (), "").check_globs(SITES, families)


def test_a_glob_of_many_stars_is_answered_at_once() -> None:
    found = settings.parse({"*a" * 40 + "b": {"ratio": 1}}, ["*a" * 40 + "b"], "here")
    start = time.monotonic()
    assert not found.may_be_unmeasured("a" * 400)
    assert found.limits("a" * 400) == ()
    assert time.monotonic() - start < 1
