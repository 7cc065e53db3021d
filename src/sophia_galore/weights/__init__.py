"""Where weights live between uses: their formats, where they are, and the files that hold them."""
