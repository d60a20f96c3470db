"""The native REST API: jobs, events, batches, pictures, models."""
