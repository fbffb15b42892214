"""Training: latent self-forcing, the systems that it is compared with, and the data that all of them learn from."""
