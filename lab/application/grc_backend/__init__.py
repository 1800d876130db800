"""Backend of the AI interview system: log in, interview sessions, messages with AI replies."""
