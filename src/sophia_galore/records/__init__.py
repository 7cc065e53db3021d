"""What a run leaves behind: the names of its files, and the schema of what is in them."""
