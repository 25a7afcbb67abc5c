"""How a config field is declared: its default, its meaning, its unit and the values it may take.

The declaration is the single source for `--help` and for the checks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from k2train.config.errors import ConfigError


def key(
    doc: str,
    *,
    unit: str = "",
    default: Any = dataclasses.MISSING,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """A dataclass field with a doc string, a unit and an allowed range (`above` excludes its
    bound).
    """
    metadata = {"doc": doc, "unit": unit, "minimum": minimum, "above": above, "maximum": maximum}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(section: str, config: Any) -> None:
    """Raise ConfigError for the first number of the dataclass `config` that lies outside its
    declared range.

    section: the dotted key of `config`, empty for a root.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        rule = _broken_rule(value, field.metadata)
        if rule:
            name = f"{section}.{field.name}" if section else field.name
            unit = field.metadata.get("unit")
            raise ConfigError(name, value, rule, f"it is counted in {unit}" if unit else "")


def _broken_rule(value: float, metadata: Any) -> str:
    minimum, above, maximum = (metadata.get(name) for name in ("minimum", "above", "maximum"))
    if not math.isfinite(value):
        return "must be a finite number"
    if minimum is not None and value < minimum:
        return f"must be at least {minimum:g}"
    if above is not None and value <= above:
        return f"must be greater than {above:g}"
    if maximum is not None and value > maximum:
        return f"must be at most {maximum:g}"
    return ""
