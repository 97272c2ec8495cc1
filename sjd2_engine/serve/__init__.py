"""Pictures over HTTP: the OpenAI images API on the engine's continuous batching."""
