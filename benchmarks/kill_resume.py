"""Kill -9 a training run at five random moments, resume it each time, and compare with a run left alone.

python benchmarks/kill_resume.py --output benchmarks/results/kill_resume.json

For each method, on one process and on two (gloo, `accelerate launch`): losses of every step, final adapter and
evaluation must be equal to the last bit. Kills fall a random time after a random step, so some hit a checkpoint that
is being written.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
from harness import kept, parser, write
from kills import command, run, run_until_killed, same_run

STEPS, SAVE_STEPS, KILLS = 30, 3, 5


def study(method: str, processes: int, seed: int) -> dict:
    """One method on some processes: where it was killed, where it went on, and whether it ended the same."""
    draw = random.Random(f"{seed} {method} {processes}")
    options = ("--steps", str(STEPS), "--save-steps", str(SAVE_STEPS))
    with tempfile.TemporaryDirectory() as scratch:
        reference, folder = Path(scratch) / "reference", Path(scratch) / "killed"
        run(command(method, reference, *options, processes=processes))
        kills = []
        for step in sorted(draw.sample(range(1, STEPS), KILLS)):
            delay = draw.uniform(0, 0.1)
            last = run_until_killed(command(method, folder, *options, "--resume", processes=processes), step, delay)
            partial = [path.name for path in folder.glob("checkpoint-*") if not (path / "trainer_state.json").exists()]
            kills.append({"after_step": last, "delay_s": round(delay, 3), "half_written": partial})
        run(command(method, folder, *options, "--resume", processes=processes))
        return {"kills": kills, "equal": same_run(folder, reference)}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--methods", nargs="+", default=["hyper-lora", "bayesian-lora", "curve-lora"])
    flags.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    flags.add_argument("--seed", type=int, default=0)
    options = flags.parse_args()
    results = {"steps": STEPS, "save_steps": SAVE_STEPS, "seed": options.seed}
    results["runs"] = kept(options.output).get("runs", {})
    for method in options.methods:
        for processes in options.processes:
            start = time.monotonic()
            found = study(method, processes, options.seed)
            results["runs"][f"{method}, {processes} process{'es' if processes > 1 else ''}"] = found
            print(method, processes, found["equal"], f"{time.monotonic() - start:.0f} s", flush=True)
            write(options.output, results)


if __name__ == "__main__":
    main()
