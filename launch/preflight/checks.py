"""All checks, a line each: name, what the nodes do step by step, who judges what they saw."""

from __future__ import annotations

from mm.launch.preflight import machine, network, software
from mm.launch.preflight.check import Check, Row, Seen, is_failure

CHECKS = (
    Check("clock", (machine.read_clock,), machine.judge_clock),
    Check("code", (software.read_code,), software.judge_code),
    Check("packages", (software.read_packages,), software.judge_packages),
    Check("config", (software.read_config,), software.judge_config),
    Check("data", (), software.judge_data),  # by what `config` has read
    Check("secrets", (machine.read_secrets,), machine.judge_secrets),
    Check("gpus", (machine.read_gpus,), machine.judge_gpus),
    Check(
        "folder",
        (machine.write_folder, machine.list_folder, machine.clear_folder),
        machine.judge_folder,
    ),
    Check("interface", (network.read_interface,), network.judge_interface),
    Check(
        "rendezvous",
        (network.listen, network.connect, network.close),
        network.judge_rendezvous,
    ),
    Check(
        "collectives",
        (None, None, None, network.meet),
        network.judge_collectives,
        needs=("interface", "rendezvous"),
    ),
)
ROUNDS = max(len(check.steps) for check in CHECKS)


def judge(seen: Seen) -> list[Row]:
    """The rows of all checks; one whose judge fails is a row that says so."""
    rows: list[Row] = []
    for check in CHECKS:
        rows += check.judge(seen)
        for answers in seen.values.get(check.name, ()):
            for i, value in answers.items():
                if is_failure(value):
                    host = seen.hosts[i]
                    mend = host.on("python3 -m mm --debug doctor")
                    rows.append(Row(check.name, host.name, "FIX", value["error"], mend))
    return rows
