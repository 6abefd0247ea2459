"""One engine: its loop, its ranks' executor, its text, its front end. State machines; imports no torch."""
