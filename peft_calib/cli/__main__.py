"""`python -m peft_calib.cli`, which `accelerate launch -m` and `torchrun -m` start."""

from .main import main

if __name__ == "__main__":  # not where the package is only looked through
    main()
