"""Named states and the one door through which a weight changes."""
