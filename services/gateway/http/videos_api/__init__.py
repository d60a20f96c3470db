"""What OpenAI's videos API says, over the same jobs."""
