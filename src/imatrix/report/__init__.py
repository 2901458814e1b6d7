"""The HTML page of `imatrix report`."""
