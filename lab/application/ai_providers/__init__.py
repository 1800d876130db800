"""Three AI providers that answer at once, the same reply to the same prompt, and fail when they are told to."""
