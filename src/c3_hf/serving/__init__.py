"""The server: contexts compressed once and kept, and asked through OpenAI's chat interface; see docs/serving.md."""
