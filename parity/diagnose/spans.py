"""Spans: the operations behind a site that no other recorded site checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parity.sites import branch, is_stream


def span_before(names: Sequence[str], position: int, is_measured: Callable[[str], bool]) -> tuple[str, ...]:
    """The unmeasured sites whose operations a site's verdict covers too: back to what was measured.

    `names` are sites in order of execution. Walks backwards along the data: a measured site closes its branch (or the
    trunk), the residual stream closes everything, and an unmeasured site of the trunk or stream opens what flows into
    it.
    """
    own = branch(names[position])
    closed: set[str] = set()
    span: list[str] = []
    for earlier in reversed(names[:position]):
        side, stream = branch(earlier), is_stream(earlier)
        if own and side not in (own, ""):
            continue
        if is_measured(earlier):
            if stream or own:
                break
            closed.add(side)
        elif stream or side not in closed:
            span.insert(0, earlier)
            own = own if side else ""
            closed = set() if stream else closed
    return tuple(span)
