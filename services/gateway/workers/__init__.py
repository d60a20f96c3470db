"""The workers of the stages: where they are, how they are, and which of them gets a call."""
