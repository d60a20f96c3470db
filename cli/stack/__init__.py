"""All four services on one machine: which to start, on which ports, and how they are kept alive."""
