"""Tasks of `alice_jax.evaluate` and what they measure by."""
