# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a routing, by how much, and what to do about it."""

from dataclasses import dataclass, field

_SEVERITIES = ("critical", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        rule: its name in kebab-case, for example "dead-experts".
        severity: "critical", "warning" or "note".
        message: one sentence with the numbers.
        evidence: the numbers, by name.
        remedy: what to do.
        confidence: how certain it is, in (0, 1].
        layer: the number of the layer, or None for the model as a whole.

    Raises:
        ValueError: another severity, or a confidence out of its range.

    Example:
        >>> Finding("dead-experts", "critical", "expert 3 has no token", {}, "a bias", 1.0).rule
        'dead-experts'
    """

    rule: str
    severity: str
    message: str
    evidence: dict[str, float | int | str | list] = field(default_factory=dict)
    remedy: str = ""
    confidence: float = 1.0
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.severity not in _SEVERITIES:
            raise ValueError(
                f"Finding: severity must be one of {', '.join(_SEVERITIES)}, got {self.severity!r}"
            )
        if not 0 < self.confidence <= 1:
            raise ValueError(f"Finding: confidence must be in (0, 1], got {self.confidence}")
