"""A run: its options, its steps, its checkpoint, and Collector, which is the face of all that."""
