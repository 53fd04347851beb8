"""Alice in JAX: self-supervised pretraining on 3-D CT by anatomical invariance and semantic alignment."""

import os

# Host work runs in many threads or processes already, on small matrices: BLAS threads of its own only spin and wait,
# which tripled the time of a sample. Must be set before numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
