# SPDX-License-Identifier: Apache-2.0
"""What a rule reports, and all of it as text, JSON and HTML."""

import html
import json
from dataclasses import asdict, dataclass, field

#: The gravest first.
SEVERITIES = ("critical", "warning", "note")


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
        if self.severity not in SEVERITIES:
            raise ValueError(
                f"Finding: severity must be one of {', '.join(SEVERITIES)}, got {self.severity!r}"
            )
        if not 0 < self.confidence <= 1:
            raise ValueError(f"Finding: confidence must be in (0, 1], got {self.confidence}")


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` has found.

    Args:
        findings: the gravest first; of the same severity causes before what they bring about.
        checked: the rules that had the data they need, whether they found something or not.

    Example:
        >>> import torch
        >>> from equipoise import diagnose
        >>> print(diagnose(torch.tensor([40, 37, 44, 39])))
        no finding
        checked: never-updated, dead-experts, starved-experts, hot-experts
    """

    findings: list[Finding]
    checked: list[str]

    def __str__(self) -> str:
        lines = []
        for number, (finding, layers) in enumerate(self._grouped(), start=1):
            where = f", {layers}" if layers else ""
            lines += [
                f"{number}. {finding.severity}: {finding.rule}{where} "
                f"(confidence {finding.confidence:.2f})",
                f"   {finding.message}",
                f"   remedy: {finding.remedy}",
                "   evidence: "
                + ", ".join(f"{name} = {_show(value)}" for name, value in finding.evidence.items()),
            ]
        lines.append("checked: " + (", ".join(self.checked) or "nothing"))
        return "\n".join([*([] if self.findings else ["no finding"]), *lines])

    def to_json(self) -> str:
        """As a JSON object with `findings` and `checked`; `from_json` reads it."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Diagnosis":
        """What `to_json` has written.

        Raises:
            ValueError: it is something else.
        """
        try:
            record = json.loads(text)
            findings = [Finding(**finding) for finding in record["findings"]]
            return cls(findings, [str(rule) for rule in record["checked"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Diagnosis.from_json: text must be what to_json wrote, got {text[:80]!r} ({error})"
            ) from error

    def to_html(self) -> str:
        """As one `<section>` with its own style, for any page; it needs nothing else."""
        items = "".join(
            f'<li class="{finding.severity}"><h3>{html.escape(finding.rule)} '
            f"<small>{finding.severity}{', ' if layers else ''}{html.escape(layers)}, "
            f"confidence {finding.confidence:.2f}</small></h3>"
            f"<p>{html.escape(finding.message)}</p>"
            f"<p><b>Remedy:</b> {html.escape(finding.remedy)}</p>"
            "<table>"
            + "".join(
                f"<tr><th>{html.escape(name)}</th><td>{html.escape(_show(value))}</td></tr>"
                for name, value in finding.evidence.items()
            )
            + "</table></li>\n"
            for finding, layers in self._grouped()
        )
        body = f"<ol>\n{items}</ol>" if items else "<p>No finding.</p>"
        checked = html.escape(", ".join(self.checked) or "nothing")
        return (
            f'<section class="equipoise-diagnosis">\n{_STYLE}\n{body}\n'
            f"<p><small>Checked: {checked}</small></p>\n</section>\n"
        )

    def _grouped(self) -> list[tuple[Finding, str]]:
        """One finding of each rule and severity, the surest, and the layers where it holds."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.rule), []).append(finding)
        return [(group[0], _name_layers(group)) for group in groups.values()]


def _show(value: float | int | str | list) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_show(x) for x in value[:12]) + (", ...]" if value[12:] else "]")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _name_layers(group: list[Finding]) -> str:
    layers = [finding.layer for finding in group if finding.layer is not None]
    if not layers:
        return ""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    others = ", ".join(str(layer) for layer in sorted(layers[1:])[:12])
    return f"layer {layers[0]}, also layers {others}" + (", ..." if len(layers) > 13 else "")


_STYLE = """<style>
.equipoise-diagnosis { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; }
.equipoise-diagnosis li { margin: 1rem 0; padding: .2rem 1rem; border-left: .4rem solid #999; }
.equipoise-diagnosis li.critical { border-left-color: #c1272d; border-left-style: double; }
.equipoise-diagnosis li.warning { border-left-color: #b36b00; }
.equipoise-diagnosis h3 { margin: 0; font-size: 1.1rem; }
.equipoise-diagnosis h3 small { font-weight: normal; color: #444; }
.equipoise-diagnosis th { text-align: left; font-weight: normal; padding-right: 1rem; color: #444; }
.equipoise-diagnosis td { font-family: monospace; overflow-wrap: anywhere; }
</style>"""
