"""The catalogue as one Markdown page: what each bug is, when it shows, how to fix it, and where it happened."""

from __future__ import annotations

from collections.abc import Iterable

from parity.faults.fault import Fault

_HEAD = """# The catalogue of porting bugs

What `parity diff` tries on a wrong operation, and what `parity faults` lists. This page is the output of
`parity faults --markdown`.
"""


def page(catalogue: Iterable[Fault]) -> str:
    """A section for each fault, in the order of the catalogue."""
    return "\n".join([_HEAD, *(_section(fault) for fault in catalogue)])


def _section(fault: Fault) -> str:
    lines = [f"## {fault.id}", "", f"{_sentence(fault.title)}", ""]
    where = ", ".join(f"`{end}`" if end else "the output of a layer" for end in fault.sites)
    lines.append(f"- **Shows first at**: {where}")
    if fault.needs:
        lines.append(f"- **Needs**: {fault.needs}")
    if fault.number:
        lines.append(f"- **Read off**: {fault.number.name}")
    lines.append(f"- **Fix**: {fault.fix}")
    if fault.source:
        lines.append(f"- **Seen in**: {fault.source}")
    return "\n".join([*lines, ""])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
