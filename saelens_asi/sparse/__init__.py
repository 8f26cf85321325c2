"""The mathematics of a sparse training step. It knows torch, and nothing of SAELens."""
