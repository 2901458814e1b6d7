"""A run: its options, its loop, its checkpoint, and Collector, which is the face of all that."""
