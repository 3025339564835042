"""The table that a command of the session ends with: at most 60 lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .session import OK, Record

LINES, WIDTH = 60, 118


def table(records: Iterable[Record], notes: Sequence[str]) -> list[str]:
    """A line a part with its time, and below it the most telling rows of its result; then the notes.

    Where there are too many lines, results give up their last rows, the longest first; no part is left out.
    """
    heads, bodies = [], []
    for record in records:
        mark = "" if record.status == OK else f"  {record.status} {record.detail}"
        heads.append(f"{record.name} ({record.seconds:.0f} s){mark}"[:WIDTH])
        bodies.append([f"  {line}"[:WIDTH] for line in _lines(record.result)])
    room = LINES - len(heads) - len(notes)
    while sum(map(len, bodies)) > max(room, 0):
        max(bodies, key=len).pop()
    return [line for head, body in zip(heads, bodies, strict=True) for line in (head, *body)] + list(notes)


def _lines(result: Any) -> list[str]:
    if isinstance(result, dict) and "counts" in result:  # tests
        counts = ", ".join(f"{count} {name}" for name, count in result["counts"].items())
        return [counts, *result["failed"], *(f"skipped {n}: {why}" for why, n in result["skipped"].items())]
    if isinstance(result, dict) and "kinds" in result:  # profile
        return [
            f"{row['kind']:<26}{_number(row['us'])} us in {_number(row['launches'])}   model "
            f"{_number(row['model_us'])} us in {_number(row['model_launches'])}"
            for row in result["kinds"]
        ]
    if isinstance(result, dict) and "sweep" in result:  # configurations
        return [_swept(row) for row in result["sweep"]]
    if isinstance(result, dict) and "rows" in result:  # operators
        return [
            f"{row['impl']:<10}{row.get('direction', 'both'):<10}{_number(row.get('p50'), 1e6)} us  "
            f"{row.get('status', 'ok')} {row.get('detail') or ''}"
            for row in result["rows"]
        ]
    if isinstance(result, list | dict) and "p50" in (result[0] if isinstance(result, list) else result):  # steps
        rows = result if isinstance(result, list) else [result]
        return [
            f"{row['impl']:<10}{1e3 * row['p50']:10.2f} ms  {row['peak_bytes'] / 2**30:.2f} GiB"
            f"  {row['utilisation']:.0%} of products' rate"
            for row in rows
        ]
    if isinstance(result, list):  # probes
        return [
            f"{row['name']:<28}{_number(row['us'])} us  "
            + (row["error"] if row["us"] is None else f"{row['tflops']:.0f} TFLOP/s {row['gbs']:.0f} GB/s")
            for row in result
        ]
    return []


def _swept(row: Mapping[str, Any]) -> str:
    """What of a kernel's configuration is better otherwise, and what the operator takes then."""
    changed = [f"{name} {old}→{row['best'][name]}" for name, old in row["pinned"].items() if row["best"][name] != old]
    return (
        f"{row['kernel']:<26}{_number(row['before'])} →{_number(row['us'])} us  {', '.join(changed) or 'as pinned'}"
        f"  ({row['tried']} tried, {row['refused']} refused{', more left' if row.get('left') else ''})"
    )


def _number(value: float | None, scale: float = 1.0) -> str:
    return f"{'–':>10}" if value is None else f"{value * scale:>10.1f}"
