"""Where the weights of the fusion model are, and how much of an operation is done at once."""
