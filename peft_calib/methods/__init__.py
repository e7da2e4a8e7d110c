"""What only one method can do: looking along a curve, making a trained LoRA Bayesian."""
