"""Numbers as a person reads them."""

from __future__ import annotations

BYTE_UNITS = ("B", "KB", "MB", "GB", "TB")
OPERATION_UNITS = ("", "K", "M", "G", "T", "P", "E")


def bytes_text(count: float) -> str:
    """``5_500_000`` -> ``5.5 MB`` (decimal units)."""
    return _scaled(count, BYTE_UNITS)


def operations_text(count: float) -> str:
    """``35_184_372_088_832`` -> ``35.2 TFLOP``."""
    return f"{_scaled(count, OPERATION_UNITS)}FLOP"


def percent_text(fraction: float | None) -> str:
    """``0.2347`` -> ``23.5 %``; None -> ``-``."""
    return "-" if fraction is None else f"{fraction:.1%}".replace("%", " %")


def _scaled(count: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(count) >= 999.5 and step < len(units) - 1:
        count /= 1000
        step += 1
    digits = f"{count:.0f}" if step == 0 or count >= 99.95 else f"{count:.1f}"
    return f"{digits} {units[step]}"
