"""The HTTP side: probes, and every family of HTTP clients, all over one engine."""
