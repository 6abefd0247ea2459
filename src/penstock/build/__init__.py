"""Where the parts are put together: `engine` (needs torch) inside an engine process or offline, `serve` (no torch) for
the HTTP front end. The only room that knows every part.
"""
