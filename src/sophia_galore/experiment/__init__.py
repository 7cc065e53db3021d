"""Several runs that answer one question: which they are, and how they are carried out."""
