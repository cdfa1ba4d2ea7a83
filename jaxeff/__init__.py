"""jaxeff: JAX models, cheaper to train and cheaper to run."""
