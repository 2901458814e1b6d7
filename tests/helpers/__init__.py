"""What the tests share: models made on the spot, independent references, and programs of the
engine."""
