"""`rethinker plan`: memory and batches of a run before anything starts."""
