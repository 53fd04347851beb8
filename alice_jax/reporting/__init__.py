"""What `alice_jax.report` is made of: pages, drawings, and the sections of a store and of a run."""
