"""Training of small models: demonstration language models, drafts. Knows no engine, no request and no server."""
