"""`python -m peft_calib.cli`, which `accelerate launch -m` and `torchrun -m` start."""

from .main import main

main()
