"""Kill -9 a training run at five random moments, resume it each time, and compare with a run left alone.

python benchmarks/kill_resume.py --output benchmarks/results/kill_resume.json

For each method, on one process and on two (gloo, `accelerate launch`): losses of every step, final adapter and
evaluation must be equal to the last bit. Kills fall a random time after a random step, so some hit a checkpoint that
is being written.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
from harness import kept, parser, write
from kills import command, run, run_until_killed, same_run

STEPS, SAVE_STEPS, KILLS, SEED = 30, 3, 5, 0


def study(method: str, processes: int) -> dict:
    """One method on some processes: where it was killed, where it went on, and whether it ended the same."""
    draw = random.Random(f"{SEED} {method} {processes}")
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
    output = parser(__doc__).parse_args().output
    results = {"steps": STEPS, "save_steps": SAVE_STEPS, "seed": SEED, "runs": kept(output).get("runs", {})}
    for method, processes in itertools.product(("hyper-lora", "bayesian-lora", "curve-lora"), (1, 2)):
        found = study(method, processes)
        results["runs"][f"{method}, {processes} process{'es' if processes > 1 else ''}"] = found
        print(method, processes, found["equal"], flush=True)
        write(output, results)


if __name__ == "__main__":
    main()
