"""`surgeon doctor`: versions, devices, and the backend of each operator on each device, with reasons against others."""

import argparse
from typing import TYPE_CHECKING

from surgeon.commands.common.arguments import print_json
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from surgeon.doctor import Diagnosis, Finding

DESCRIPTION = "versions, devices, and the backend of each operator on each device, with reasons against others"
EXAMPLES = """  surgeon doctor
  surgeon doctor --json > machine.json

Every operator runs once on a small input of every device and dtype and is compared with its
reference. Exit code 1: one of them fails or differs.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments except --json, --quiet and --debug."""


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.doctor import diagnose

    with waiting("running every operator", quiet=args.quiet):
        found = diagnose()
    if args.json:
        print_json(found.to_dict())
    else:
        print(_text(found))
    return 0 if found.healthy else 1


def _text(found: "Diagnosis") -> str:
    from surgeon.commands.common.console import width
    from surgeon.util.tables import count, paragraph, table

    columns = width()
    parts = [
        table(
            ("package", "version"), [(name, told or "not installed") for name, told in found.versions.items()], left=2
        )
    ]
    devices = []
    for device in found.devices:
        facts = [f"{device['cores']} cores, {device['capability']}"] if "cores" in device else []
        facts += (
            [f"{count(device['memory_bytes'], 'B')}, sm {device['capability']}"] if "memory_bytes" in device else []
        )
        devices.append((device["name"], "; ".join([device["what"], *facts])))
    parts.append(table(("device", "what"), devices, width=columns, left=5))
    settings = [(name, "not set" if told is None else str(told)) for name, told in found.settings.items()]
    parts.append(table(("setting", "value"), settings, width=columns, left=5))
    parts.append(table(("folder", "path"), list(found.folders.items()), width=columns, left=5))
    parts.append(table(("operator", "device", *_dtypes(found)), _rows(found), width=columns, left=2))
    lines = ["why not the others:"]
    for told, where in _reasons(found).items():
        lines.append(paragraph(f"{told} ({', '.join(where)})", width=columns, indent="  ", hang="    "))
    problems = [f for f in found.findings if f.problem]
    lines += [paragraph(f"PROBLEM {f.operator} on {f.device}, {f.dtype}: {f.problem}", width=columns) for f in problems]
    verdict = (
        "every operator computes what its reference computes" if found.healthy else "something is wrong, see above"
    )
    return "\n\n".join([*parts, "\n".join(lines), verdict])


def _dtypes(found: "Diagnosis") -> list[str]:
    return list(dict.fromkeys(finding.dtype for finding in found.findings))


def _rows(found: "Diagnosis") -> list[tuple[str, ...]]:
    """A row per operator and device: the backend by dtype, and its error."""
    rows: dict[tuple[str, str], list[Finding]] = {}
    for finding in found.findings:
        rows.setdefault((finding.operator, finding.device), []).append(finding)
    return [(*where, *(_cell(finding) for finding in findings)) for where, findings in rows.items()]


def _cell(finding: "Finding") -> str:
    if finding.problem:
        return f"{finding.backend or 'none'}: PROBLEM"
    return f"{finding.backend} ({finding.error:.0e})"


def _reasons(found: "Diagnosis") -> dict[str, list[str]]:
    """Each `backend: reasons` with the operators and devices to which it applies."""
    told: dict[str, list[str]] = {}
    for finding in found.findings:
        for backend, reasons in finding.against.items():
            where = told.setdefault(f"{backend}: {'; '.join(reasons)}", [])
            place = f"{finding.operator} on {finding.device}"
            if place not in where:
                where.append(place)
    pairs = list(dict.fromkeys((finding.operator, finding.device) for finding in found.findings))
    whole = {device: [f"{name} on {one}" for name, one in pairs if one == device] for _, device in pairs}
    for reason, where in told.items():
        for device, places in whole.items():
            if len(places) > 1 and set(places) <= set(where):
                told[reason] = [f"all on {device}", *(place for place in told[reason] if place not in places)]
    return told
