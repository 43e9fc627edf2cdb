"""The embedded model, the procedural world that it was trained on, and what made them."""
