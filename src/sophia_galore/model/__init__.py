"""Models: where they come from, their architecture, and export."""
