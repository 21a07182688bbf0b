"""The pages of two engines and of invariance: what stands in them, and that nothing foreign gets in."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from parity.errors import UsageError
from parity.report.contrast import as_json, write_contrast
from parity.report.engine_page import summary
from parity.report.invariance import write_invariance
from tests.engine_example import EVIL, contrast, invariance


def rows(page: str, section: str) -> list[list[str]]:
    table = page.partition(f'<section id="{section}">')[2].partition("</section>")[0].partition("<tbody>")[2]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in table.split("<tr>")[1:]]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in cells]


def test_the_page_of_two_engines_has_both_verdicts_distances_and_positions(tmp_path: Path) -> None:
    page = write_contrast(contrast(), tmp_path).read_text()
    assert "the second engine is wrong" in page
    assert [row[:4] for row in rows(page, "logprobs")] == [
        ["1", "0.01", "0.02", "0.50"],
        ["2–3", "0.4", "0.01", "40"],
    ]
    assert page.count('class="bad" x="0"') == 1, "the span that is farther than rounding"
    assert 'width="5.0"' in page, "bars on one scale: 0.01 of 0.4 of 200 pixels"
    layers = rows(page, "layers")
    assert [row[0] for row in layers] == ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
    assert {row[7] for row in layers[1:]} == {"3.00"}
    assert "7 of 9 positions" in page
    assert page.count("<circle") >= 5
    assert '<path class="band" d="M' in page
    assert EVIL not in page
    assert "llama.cpp (" in page
    assert not re.search(r"https?://|src=|<script|style=", page)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(as_json(contrast())))
    assert (tmp_path / "second" / "index.html").is_file()


@pytest.mark.parametrize(
    ("verdicts", "weights", "said"),
    [
        (("match", "match"), "", "each engine is right up to rounding"),
        (("diverged", "match"), "", "the first engine is wrong"),
        (("diverged", "diverged"), "", "both engines are wrong"),
        (("match", "inconclusive"), "", "the second is undecided"),
        (("match", "match"), "a and b", "the weights differ; each engine is right up to rounding"),
    ],
)
def test_which_is_wrong_is_said_first(verdicts: tuple[str, str], weights: str, said: str) -> None:
    c = contrast()
    first, second = (replace(side, verdict=v) for side, v in zip((c.first, c.second), verdicts, strict=True))
    assert summary(replace(c, first=first, second=second, weights=weights)) == said


def test_in_two_dtypes_numbers_are_compared_not_bits() -> None:
    c = contrast()
    other = replace(c.second, environment=replace(c.second.environment, candidate_dtype="float16"))
    distances = (replace(c.distances[0], bit_equal=False), *c.distances[1:])
    mixed = replace(c, second=other, distances=distances)
    assert (c.compared, mixed.compared) == ("bits", "numbers")
    assert [len(x.apart) for x in (c, mixed, replace(c, distances=distances))] == [
        len(c.distances) - 1,
        len(c.distances) - 1,
        len(c.distances),
    ]


def test_the_files_of_invariance(tmp_path: Path) -> None:
    page = write_invariance(invariance(), tmp_path / "new").read_text()
    assert "DIVERGED" in page.upper()
    assert "the same bits" in page
    assert EVIL not in page
    assert ">1.05<" in page
    assert not re.search(r"https?://|src=|<script|style=", page)
    assert json.loads((tmp_path / "new" / "report.json").read_text())["verdict"] == "diverged"
    text = (tmp_path / "new" / "report.md").read_text()
    assert "self_attn.context | 0 | against " in text
    assert "the first is model.layers.0.self_attn.context against " in text
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="the report cannot be written"):
        write_invariance(invariance(), tmp_path / "file")
