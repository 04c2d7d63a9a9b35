"""`rethinker plan`: memory, batches and time of a run before anything starts."""
