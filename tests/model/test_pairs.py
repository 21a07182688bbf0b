"""The bench of pairs: two legal engines are no alarm, a planted bug is one and is found at its site."""

from __future__ import annotations

import pytest

from tests.bench.pairs import KINDS, bug_pairs, clean_pair, run_one


@pytest.mark.slow
def test_a_legal_pair_is_a_match_and_a_planted_bug_is_found() -> None:
    legal = run_one(clean_pair(seed=KINDS.index("batch")))
    assert (legal.verdict, legal.pair.kind, legal.mean_exp >= 1.0) == ("match", "batch", True)
    planted = run_one(bug_pairs(20)[0])
    assert (planted.verdict, planted.found) == ("diverged", True)


def test_pairs_cover_what_engines_differ_in() -> None:
    pairs = [clean_pair(seed) for seed in range(200)]
    assert {pair.kind for pair in pairs} == set(KINDS)
    assert len({pair.architecture for pair in pairs}) == 9
    assert {engine.dtype for pair in pairs for engine in pair.engines} == {"float32", "bfloat16", "float16"}
    assert all(pair.engines[0] != pair.engines[1] for pair in pairs)
    assert len({pair.kind for pair in bug_pairs(20)}) == 20
