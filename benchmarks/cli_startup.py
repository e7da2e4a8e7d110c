"""CPU seconds of a help and a version, ours and trl's, measured in turns so that both see the same machine.

python benchmarks/cli_startup.py --output benchmarks/results/cli_startup.json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

OURS, TRL = "from peft_calib_cli import main; main()", "from trl.cli import main; main()"
COMMANDS = {
    "peft-calib --help": (OURS, ["--help"]),
    "peft-calib train --help": (OURS, ["train", "--help"]),
    "peft-calib --version": (OURS, ["--version"]),
    "trl --help": (TRL, ["--help"]),
}


def cpu_seconds(code: str, words: list[str]) -> float:
    """User and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    for command in COMMANDS.values():  # the first call reads files from the disk
        cpu_seconds(*command)
    times = {name: [] for name in COMMANDS}
    for _ in range(args.repeats):
        for name, command in COMMANDS.items():
            times[name].append(cpu_seconds(*command))
    commands = {name: {"median_s": statistics.median(t), "least_s": min(t)} for name, t in times.items()}
    ratio = commands["peft-calib --help"]["median_s"] / commands["trl --help"]["median_s"]
    packages = {name: version(name) for name in ("trl", "typer", "rich")}
    content = {"repeats": args.repeats, "commands": commands, "help_to_trl": ratio, "packages": packages}
    print(json.dumps(content, indent=2))
    if args.output:
        args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
