"""What is done with a trained adapter: along a curve, around a LoRA, and one LoRA in the place of many draws."""
