"""Fine-tuning: the gradient, the optimizer, the step."""
