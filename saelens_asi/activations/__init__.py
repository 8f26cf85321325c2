"""From text and a model to vectors at hooks."""
