"""What holds for every test."""

import matplotlib

# Figures are drawn, never shown.
matplotlib.use("Agg")
