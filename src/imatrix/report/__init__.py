"""The HTML page of `imatrix report`: page puts together what the other modules tell."""
