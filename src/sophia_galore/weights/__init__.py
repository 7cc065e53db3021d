"""Storage of weights between uses: their formats, the store, and the files."""
