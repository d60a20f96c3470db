"""Who calls and what they may: API keys, roles, limits. gRPC, HTTP and Socket.IO ask here; nothing else decides."""
