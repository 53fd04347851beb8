"""Alice in JAX: self-supervised pretraining on 3-D CT by anatomical invariance and semantic alignment."""

__version__ = "0.1.0"
