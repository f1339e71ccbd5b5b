"""fcvit_jax: Vision Transformers made cheaper at inference without training, in JAX and Flax."""
