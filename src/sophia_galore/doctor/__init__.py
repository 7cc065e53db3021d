"""Whether everything works on this machine: its facts, and a minute of tiny training runs that are compared."""
