"""Pictures side by side, what separates them, and the figures all plots are drawn on."""
