"""How much memory a run needs: counted while it runs, and predicted before it begins."""
