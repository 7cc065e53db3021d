"""What a planner says of a subject: what it needs, what there is, how many layers keep their graphs."""
