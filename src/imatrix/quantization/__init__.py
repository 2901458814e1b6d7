"""What a quantizer does with a matrix: types and rules, coverage, adaptation, and quantizing."""
