"""Training of the demo model and its adapters, and the checks of what was trained. Not part of the wheel."""
