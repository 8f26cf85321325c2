"""Mean and covariance of activations, and what they say about their dimension."""
