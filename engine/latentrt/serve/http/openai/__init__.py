"""OpenAI's Images API: routes, bodies and answers."""
